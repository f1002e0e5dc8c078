"""The seed that rows are ordered, and validation rows held out, by."""

import os
from typing import Any

import torch


def choose_seed(trainer: Any) -> int:
    """Take the seed of ``seed_everything``, else torch's; the same one for all processes of a trainer."""
    seed = int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed())
    if trainer is not None and trainer.world_size > 1:
        seed = trainer.strategy.broadcast(seed)  # without seed_everything each process may have its own
    return seed


def describe_other_seed(stored: int | None, own: int | None) -> str | None:
    """Say that a checkpoint's seed rules, where the user asked for another by ``seed_everything``."""
    if stored is None or own is None or stored == own or not os.environ.get("PL_GLOBAL_SEED"):
        return None
    return (
        f"seed_everything is {own}, but the checkpoint's {stored} rules: the order of rows, and which of them are held "
        "out for validation, go on as they were."
    )
