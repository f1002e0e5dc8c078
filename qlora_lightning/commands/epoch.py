"""What an epoch of a config takes, for ``inspect`` and ``plan``: batches, optimizer steps and tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.support.errors import UserError

_USUAL_EPOCHS = 1000  # Lightning's, if neither epochs nor steps end a run


@dataclass(frozen=True)
class Epoch:
    """One epoch of the training rows, and what the whole run makes of it."""

    batches: int  # on each device
    mean_tokens: float  # per batch
    mean_rows: float  # per batch
    most_tokens: int  # of the largest batch
    tokens: int  # of all rows
    devices: int  # of all nodes, on which batches run side by side
    accumulate: int  # batches per optimizer step
    steps: int  # optimizer steps per epoch
    epochs: int | None  # of the run at most; None if only steps end it
    all_steps: int | None  # of the run; None if nothing ends it
    all_tokens: int | None  # of the run, about


def training_plan(data: Any) -> EpochPlan:
    """Return the batches of a data module that is set up."""
    plan: EpochPlan = data.train_dataloader().plan
    return plan


def plan_epoch(plan: EpochPlan, trainer: Mapping[str, Any]) -> Epoch:
    """Count what the Trainer's settings, with their defaults, make of the first epoch of batches for one device."""
    accumulate, max_steps, max_epochs = (
        trainer[name] for name in ("accumulate_grad_batches", "max_steps", "max_epochs")
    )
    if max_epochs is None:
        max_epochs = _USUAL_EPOCHS if max_steps == -1 else -1
    epochs = None if max_epochs == -1 else max_epochs
    devices, limit = count_devices(trainer), trainer["limit_train_batches"]
    batches = len(replace(plan, world_size=devices))
    if limit is not None:
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    steps = math.ceil(batches / accumulate)
    ends = [max_steps] if max_steps >= 0 else []
    ends += [] if epochs is None else [epochs * steps]
    all_steps, all_batches = min(ends, default=None), None
    if all_steps is not None:
        all_batches = min(all_steps * accumulate, math.inf if epochs is None else epochs * batches)
    lengths = plan.samples.lengths
    batch_tokens = [int(lengths[batch.rows].sum()) for batch in plan.batches(0)]
    mean_tokens = sum(batch_tokens) / max(1, len(batch_tokens))
    return Epoch(
        batches=batches,
        mean_tokens=mean_tokens,
        mean_rows=len(lengths) / max(1, len(batch_tokens)),
        most_tokens=max(batch_tokens, default=0),
        tokens=sum(batch_tokens),
        devices=devices,
        accumulate=accumulate,
        steps=steps,
        epochs=epochs,
        all_steps=all_steps,
        all_tokens=None if all_batches is None else round(all_batches * devices * mean_tokens),
    )


def count_devices(trainer: Mapping[str, Any]) -> int:
    """Count the devices of all nodes that ``trainer.devices`` asks for: a number, a list, or all of this machine."""
    devices = str(trainer["devices"])
    if devices in ("auto", "-1"):
        on_gpu = trainer["accelerator"] in ("auto", "gpu", "cuda")
        count = max(1, torch.cuda.device_count()) if on_gpu else 1
    elif devices.isdigit():
        count = int(devices)
    else:  # "0,1," or [0, 1]
        count = len([number for number in devices.strip("[]").split(",") if number.strip()])
    if count < 1:
        raise UserError(f"trainer.devices is {devices}: expected one or more.")
    return count * int(trainer["num_nodes"])
