"""Runs commands on several processes of this machine's CPU, by gloo, and on one process to compare with.

As a script it is what each process of a launch runs: several commands one after another, so that starting is paid for
once. Its argument is a file, a JSON list of argument lists.
"""

import atexit
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from qlora_lightning.cli import main
from tests.equality import read_adapter

HERE = Path(__file__).parent
CONFIG = yaml.safe_load("""
seed_everything: 3
model: {base: tiny, rank: 2, compute_dtype: fp32, learning_rate: 0.01, schedule: constant, warmup: 0.0}
data: {train: rows.jsonl}
trainer: {accelerator: cpu, strategy: ddp, devices: 2, enable_progress_bar: false}
""")


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": "1", "QLORA_LIGHTNING_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    return {**os.environ, **own, "PYTHONPATH": path}


def launch(folder: Path, commands: list[list], processes: int = 2, timeout: float = 300, rejected: bool = False) -> str:
    """Run commands in turn on processes of one torchrun, all rejected (code 2) or none; give what they print."""
    file = folder / "commands.json"
    file.write_text(json.dumps(commands))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    streams = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    options = {"cwd": folder, "env": environment(folder), "timeout": timeout}
    done = subprocess.run([*torchrun, __file__, file], **streams, **options)
    assert done.returncode == 0, done.stdout
    assert ("code 2: " in done.stdout) is rejected, done.stdout
    return done.stdout


def distance(one: Path, other: Path) -> float:
    """How far two runs' adapters are apart, as a share of what training has moved (at least B, which began at zero)."""
    a, b = (read_adapter(run) for run in (one, other))
    moved = sum(tensor.square().sum() for name, tensor in a.items() if "lora_B" in name)
    return float(torch.sqrt(sum((a[name] - b[name]).square().sum() for name in a) / moved))


if __name__ == "__main__":
    # One write: the lines of two processes must not interleave in the file they share.
    atexit.register(lambda: os.write(1, f"in a group at exit: {torch.distributed.is_initialized()}\n".encode()))
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        print(f"\ncode {main(argv)}: {argv[-1]}", flush=True)
