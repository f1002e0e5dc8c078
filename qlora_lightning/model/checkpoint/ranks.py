"""Random generators and other state that each rank has of its own, gathered into a checkpoint."""

import random
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device


def capture_generators() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators, and of the one of this process's GPU."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if _computes_on_gpu() else [],
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Put back what :func:`capture_generators` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and _computes_on_gpu():
        torch.cuda.set_rng_state(state["cuda"][0])


def _computes_on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # to ask for a generator initializes


def gather_states(mine: dict[str, Any], rank: int, world_size: int) -> list[dict[str, Any]]:
    """Collect the states of all processes on the first one; the others, which must call it too, get their own."""
    if world_size == 1:
        return [mine]
    states: list[Any] | None = [None] * world_size if rank == 0 else None
    # On the CPU: a tensor of GPU 3 would be unpickled onto GPU 3, by the process of GPU 0.
    torch.distributed.gather_object(move_data_to_device(mine, torch.device("cpu")), states)
    return states or [mine]
