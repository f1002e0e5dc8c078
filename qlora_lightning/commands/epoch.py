"""What an epoch of a config takes, for ``inspect`` and ``plan``: batches, optimizer steps and tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_lightning.data.batches.epoch_plan import EpochPlan

_USUAL_EPOCHS = 1000  # Lightning's, if neither epochs nor steps end a run


@dataclass(frozen=True)
class Epoch:
    """One epoch of the training rows, and what the whole run makes of it."""

    batches: int  # on each device
    tokens: int  # of all rows
    mean_tokens: float  # per batch
    devices: int  # of all nodes, on which batches run side by side
    accumulate: int  # batches per optimizer step
    steps: int  # optimizer steps per epoch
    epochs: int | None  # of the run at most; None if only steps end it
    all_steps: int | None  # of the run; None if nothing ends it
    all_tokens: int | None  # of the run, about


def plan_epoch(plan: EpochPlan, trainer: Mapping[str, Any]) -> Epoch:
    """Count what the Trainer's settings, with their defaults, make of the first epoch of batches for one device."""
    accumulate, max_steps, epochs = (trainer[name] for name in ("accumulate_grad_batches", "max_steps", "max_epochs"))
    if epochs is None and max_steps == -1:
        epochs = _USUAL_EPOCHS
    epochs = None if epochs == -1 else epochs
    devices, limit = count_devices(trainer), trainer["limit_train_batches"]
    batches = len(replace(plan, world_size=devices))
    if limit is not None:
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    steps = math.ceil(batches / accumulate)
    ends = [] if epochs is None else [epochs * steps]
    all_steps = min([*ends, max_steps] if max_steps >= 0 else ends, default=None)
    counts = [int(plan.samples.lengths[batch.rows].sum()) for batch in plan.batches(0)]
    tokens = sum(counts)
    mean_tokens, all_tokens = tokens / max(1, len(counts)), None
    if all_steps is not None:
        all_batches = min(all_steps * accumulate, math.inf if epochs is None else epochs * batches)
        all_tokens = round(all_batches * devices * mean_tokens)
    return Epoch(batches, tokens, mean_tokens, devices, accumulate, steps, epochs, all_steps, all_tokens)


def count_devices(trainer: Mapping[str, Any]) -> int:
    """Count the devices of all nodes that ``trainer.devices`` asks for: a number, a list, or all of this machine."""
    devices = str(trainer["devices"])
    if devices in ("auto", "-1"):
        count = torch.cuda.device_count() if trainer["accelerator"] in ("auto", "gpu", "cuda") else 1
    else:  # "0,1," or [0, 1]
        listed = [number for number in devices.strip("[]").split(",") if number.strip()]
        count = int(devices) if devices.isdigit() else len(listed)
    return max(1, count) * int(trainer["num_nodes"])
