"""Processes that measure: how they are started, and what both sides of the comparison share.

The peer's interpreter imports this file too: it needs torch and the standard library, nothing more.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]

BATCH_SIZE = 8
MAX_LENGTH = 512
RANK = 8
ALPHA = 16
LEARNING_RATE = 2e-4  # decays linearly to 0, without warm-up
GRADIENT_CLIP = 0.3
SEED = 0

_SPAWNED_AT = "BENCHMARK_SPAWNED_AT"


def run_child(module: str, threads: int, python: str = sys.executable, **arguments: Any) -> dict[str, Any]:
    """Run a module of this folder, which calls :func:`serve`, in a process of its own and return its figures."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", _SPAWNED_AT: str(time.time())}
    command = [python, "-m", f"tests.benchmarks.{module}", json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n" + (done.stdout + done.stderr)[-3000:])
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def serve(measure: Callable[..., dict[str, Any]]) -> None:
    """Call a function with the arguments of :func:`run_child`, and print its figures as the last line."""
    print("\n" + json.dumps(measure(**json.loads(sys.argv[1]))), flush=True)


def seconds_since_spawn() -> float:
    """Return the age of this child in seconds; 0.0 in other processes."""
    now = time.time()
    return now - float(os.environ.get(_SPAWNED_AT, now))


def read_peak_bytes(on_gpu: bool) -> int:
    """Return the most memory that this process has held: allocated on the card, or resident.

    ``getrusage`` carries over from the parent what it held when it started us; Linux's VmHWM does not.
    """
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def versions_of(*packages: str) -> dict[str, str]:
    """Return the installed version of torch, transformers, PEFT, bitsandbytes and of other packages."""
    return {package: version(package) for package in ("torch", "transformers", "peft", "bitsandbytes", *packages)}
