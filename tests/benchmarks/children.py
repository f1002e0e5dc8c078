"""Fresh processes: each measurement imports, loads and trains on its own, and hands back one line of JSON."""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SPAWNED_AT = "BENCHMARK_SPAWNED_AT"


def run_child(python: str, module: str, arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a module of this folder in a process of its own and read the last line that it printed.

    Args:
        python: the interpreter.
        module: name of a file here, without ``.py``.
        arguments: for it.
        threads: that all its libraries may use.

    Raises:
        RuntimeError: the process failed; the message holds what it said.
    """
    # By the environment, so that every library's pool of threads hears of it.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", _SPAWNED_AT: str(time.time())}
    command = [python, "-m", f"tests.benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise RuntimeError(f"{module} failed (exit code {done.returncode}). Its last words:\n{said}")
    try:
        figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise RuntimeError(f"{module} ended without figures. Is {python} an interpreter of Python?") from error
    return figures


def seconds_since_spawn() -> float:
    """Tell, in a child, how long ago its parent started it; 0.0 in a process that nobody measures."""
    spawned_at = os.environ.get(_SPAWNED_AT)
    return 0.0 if spawned_at is None else time.time() - float(spawned_at)


def print_figures(figures: dict[str, Any]) -> None:
    """Print what a child measured as the last thing that it says."""
    print(json.dumps(figures), flush=True)
