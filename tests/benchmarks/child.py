"""Processes that measure: how they are started, and what both sides of the comparison share.

The peer's interpreter imports this file too: it needs torch and the standard library, nothing more.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
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
PAIRS = 4  # of a micro-batch of preferences
BETA = 0.1
SEED = 0

_SPAWNED_AT = "BENCHMARK_SPAWNED_AT"


def run_child(
    function: str, threads: int, python: str = sys.executable, variables: Mapping[str, str] = {}, **arguments: Any
) -> dict[str, Any]:
    """Call a function of this folder, such as ``ours.measure``, in a process of its own and return its figures."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} | variables
    environment |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", _SPAWNED_AT: str(time.time())}
    command = [python, "-m", "tests.benchmarks.child", function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{function} failed:\n" + (done.stdout + done.stderr)[-3000:])
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


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


def take_first_step(model: torch.nn.Module, compute_loss: Callable[[], torch.Tensor], file: str) -> dict[str, Any]:
    """Compute a ``loss`` with an adapter that both sides draw alike, and write its gradients to a file."""
    model.train()
    trained = [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
    generator = torch.Generator().manual_seed(SEED)
    for parameter in trained:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02  # in float32: TRL rounds to bf16
    loss = compute_loss()
    loss.backward()
    torch.save(torch.cat([parameter.grad.flatten() for parameter in trained]), file)
    return {"loss": loss.item()}


if __name__ == "__main__":
    module, _, name = sys.argv[1].rpartition(".")
    measure = getattr(importlib.import_module(f"tests.benchmarks.{module}"), name)
    print("\n" + json.dumps(measure(**json.loads(sys.argv[2]))), flush=True)
