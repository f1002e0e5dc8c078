"""Random generators and other state that each rank has of its own, gathered into a checkpoint and shared out again."""

import random
from collections.abc import Sequence
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


RankState = dict[str, Any]
"""``generators`` (see ``capture_generators``) and ``window`` (see ``Window.state_dict``) of one process."""


def gather_states(mine: RankState, rank: int, world_size: int) -> list[RankState]:
    """Collect the states of all processes on the first one; the others, which must call it too, get their own."""
    if world_size == 1:
        return [mine]
    states: list[Any] | None = [None] * world_size if rank == 0 else None
    # On the CPU: a tensor of GPU 3 would be unpickled onto GPU 3, by the process of GPU 0.
    torch.distributed.gather_object(move_data_to_device(mine, torch.device("cpu")), states)
    return states or [mine]


def share_states(states: Sequence[RankState], rank: int, world_size: int) -> RankState:
    """Return a process's part of what :func:`gather_states` collected.

    With another number of processes than then, the first one takes over the open windows of all, which gives the same
    mean gradient up to rounding, and the others zeros; a process that there was not gets no generators.
    """
    if len(states) == world_size:
        return states[rank]
    generators = states[rank]["generators"] if rank < len(states) else {}
    windows, share = [state["window"] for state in states], 1 if rank == 0 else 0
    if not all(windows):
        return {"generators": generators, "window": {}}
    names = dict.fromkeys(name for window in windows for name in window["gradients"])
    window = {
        "micro_batches": windows[0]["micro_batches"],
        "nll_sum": share * sum(each["nll_sum"] for each in windows),
        "labelled_tokens": share * sum(each["labelled_tokens"] for each in windows),
        "logged": {n: share * sum(each["logged"][n] for each in windows) for n in windows[0].get("logged", {})},
        "row_ids": share * [row_id for each in windows for row_id in each["row_ids"]],
        "gradients": {
            n: share * sum(each["gradients"][n] for each in windows if n in each["gradients"]) for n in names
        },
    }
    return {"generators": generators, "window": window}
