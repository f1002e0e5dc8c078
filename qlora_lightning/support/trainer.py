"""What Lightning's connectors put on a Trainer, and its class does not declare."""

from typing import Any, TypeVar

import torch.distributed
from lightning import Callback, Trainer

Item = TypeVar("Item")
Found = TypeVar("Found", bound=Callback)


def datamodule_of(trainer: Any) -> Any:
    """Return the data module of a Trainer; ``None`` without one, and without a Trainer."""
    return getattr(trainer, "datamodule", None)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks, in the order in which they are called."""
    connected: Any = trainer
    callbacks: list[Callback] = connected.callbacks
    return callbacks


def find_callback(trainer: Trainer, kind: type[Found]) -> Found | None:
    """Return the first callback of a class, if there is one."""
    return next((each for each in callbacks_of(trainer) if isinstance(each, kind)), None)


def is_trial_run(trainer: Trainer) -> bool:
    """Whether ``fast_dev_run`` was asked for: a few batches that leave nothing behind."""
    connected: Any = trainer
    return bool(connected.fast_dev_run)


def gather_lists(trainer: Trainer, own: list[Item]) -> list[Item]:
    """Return to every process the lists of all, one after the other in the order of their ranks."""
    if trainer.world_size == 1:
        return own
    parts: list[list[Item]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(parts, own)
    return [item for part in parts for item in part]
