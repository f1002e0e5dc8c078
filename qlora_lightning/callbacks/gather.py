"""Lists that the processes of a run hold parts of."""

from typing import TypeVar

from lightning import Trainer

Item = TypeVar("Item")


def gather_lists(trainer: Trainer, own: list[Item]) -> list[Item]:
    """Give every process the lists of all, one after the other in the order of their ranks."""
    if trainer.world_size == 1:
        return own
    import torch.distributed

    parts: list[list[Item]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(parts, own)
    return [item for part in parts for item in part]
