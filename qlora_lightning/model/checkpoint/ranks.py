"""Random generators and other state that each rank has of its own, gathered into a checkpoint and shared out again."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def capture_generators() -> dict[str, Any]:
    """Take down the state of Python's, NumPy's and torch's generators, and of the one of this process's GPU."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # one, in a list as in 0.1.0
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Put back what :func:`capture_generators` took down."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])


RankState = dict[str, Any]
"""``generators`` (see ``capture_generators``) and ``window`` (see ``Window.state_dict``) of one process."""


def gather_states(mine: RankState, rank: int, world_size: int) -> list[RankState]:
    """Collect the states of all processes on the first one; every process must call it.

    Args:
        mine: This process's state.
        rank: Its number.
        world_size: How many there are.

    Returns:
        On the first process one state per process in their order, on the others nothing.
    """
    if world_size == 1:
        return [mine]
    states: list[Any] | None = [None] * world_size if rank == 0 else None
    # On the CPU: a tensor of GPU 3 would be unpickled onto GPU 3, by the process of GPU 0.
    torch.distributed.gather_object(_to_cpu(mine), states)
    return states or []


def share_states(states: Sequence[RankState], rank: int, world_size: int) -> RankState:
    """Give a process its part of what :func:`gather_states` collected.

    With another number of processes than then, the first one takes over the open windows of all, which gives the same
    mean gradient up to rounding, and random generators go on where a process has had one.

    Args:
        states: Of all processes that saved, in their order.
        rank: This process's number.
        world_size: How many there are now.

    Returns:
        ``generators``, empty if this process had none, and ``window``.
    """
    if len(states) == world_size:
        return states[rank]
    windows = [state["window"] for state in states]
    merged = _merge_windows(windows) if all(windows) else {}
    return {
        "generators": states[rank]["generators"] if rank < len(states) else {},
        "window": merged if rank == 0 else _without_content(merged),
    }


def _merge_windows(windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for window in windows for name in window["gradients"])
    return {
        **windows[0],
        "nll_sum": sum(window["nll_sum"] for window in windows),
        "labelled_tokens": sum(window["labelled_tokens"] for window in windows),
        "row_ids": [row_id for window in windows for row_id in window["row_ids"]],
        "gradients": {name: sum(w["gradients"][name] for w in windows if name in w["gradients"]) for name in names},
    }


def _without_content(window: Mapping[str, Any]) -> dict[str, Any]:
    if not window:
        return {}
    zero = {name: torch.zeros_like(window[name]) for name in ("nll_sum", "labelled_tokens")}
    gradients = {name: torch.zeros_like(gradient) for name, gradient in window["gradients"].items()}
    return {**window, **zero, "row_ids": [], "gradients": gradients}


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(each) for key, each in value.items()}
    return [_to_cpu(each) for each in value] if isinstance(value, list) else value


def describe_other_number(saved: int, now: int) -> str:
    """Say what stays as it was, and what does not, where another number of processes goes on."""
    return (
        f"The checkpoint was saved by {_count(saved)}, and {now} {'goes' if now == 1 else 'go'} on. Each optimizer "
        "step has the rows that it would have had, where batch_size times processes times "
        "trainer.accumulate_grad_batches is what it was. But dropout draws other numbers, and sums are rounded "
        "otherwise: the adapter will be as good, and not the same bit for bit."
    )


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
