"""What an epoch of a config costs, for ``inspect`` and ``plan``: from its data and its trainer section."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_lightning.data.batches.epoch_plan import EpochPlan

DEFAULT_EPOCHS = 1  # as `fit` has it


@dataclass(frozen=True)
class Epoch:
    """One epoch of the training rows.

    Attributes:
        batches: Micro-batches on each device.
        mean_tokens: Tokens per micro-batch, on average.
        most_tokens: Tokens of the largest micro-batch.
        budget: ``tokens_per_batch``; None if batches are made of rows.
        tokens: Tokens of all rows.
        devices: Devices of all nodes, on which micro-batches run side by side.
        accumulate: Micro-batches per optimizer step.
        steps: Optimizer steps per epoch.
        all_steps: Optimizer steps of the whole run; None if nothing ends it.
        epochs: Epochs of the whole run; None if only steps end it.
        streaming: Whether the rows are only the first ones of a stream, which has no epochs.
    """

    batches: int
    mean_tokens: float
    most_tokens: int
    budget: int | None
    tokens: int
    devices: int
    accumulate: int
    steps: int
    all_steps: int | None
    epochs: int | None
    streaming: bool = False


def training_plan(data: Any) -> EpochPlan:
    """Return the micro-batches of a data module that is set up; of a stream those of its first rows."""
    if data.streaming:
        return EpochPlan(data.samples["train"], data.batch_size, data.tokens_per_batch, shuffle=True)
    plan: EpochPlan = data.train_dataloader().plan
    return plan


def plan_epoch(plan: EpochPlan, trainer: dict[str, Any], streaming: bool = False) -> Epoch:
    """Count what the trainer's settings make of the first epoch.

    Args:
        plan: Micro-batches for one device.
        trainer: The trainer section of the config.
        streaming: Whether these are only the first rows of a stream.
    """
    accumulate = _number(trainer, "accumulate_grad_batches", 1)
    devices = count_devices(trainer)
    batches, limit = len(replace(plan, world_size=devices)), trainer.get("limit_train_batches")
    if isinstance(limit, float):
        batches = int(batches * limit)
    elif limit is not None:
        batches = min(batches, int(limit))
    lengths = plan.samples.lengths
    batch_tokens = [int(lengths[batch.rows].sum()) for batch in plan.batches(0)]
    steps = math.ceil(batches / accumulate)
    max_steps = _number(trainer, "max_steps", -1)
    epochs = _number(trainer, "max_epochs", DEFAULT_EPOCHS)
    ends = [end for end in (-1 if streaming else epochs * steps, max_steps) if end >= 0]
    return Epoch(
        batches=batches,
        mean_tokens=sum(batch_tokens) / max(1, len(batch_tokens)),
        most_tokens=max(batch_tokens, default=0),
        budget=plan.tokens_per_batch,
        tokens=sum(batch_tokens),
        devices=devices,
        accumulate=accumulate,
        steps=steps,
        all_steps=min(ends, default=None),
        epochs=None if epochs < 0 or streaming else epochs,
        streaming=streaming,
    )


def count_devices(trainer: dict[str, Any]) -> int:
    """Count the devices of all nodes that ``trainer.devices`` asks for: a number, a list, or all of this machine."""
    devices = trainer.get("devices", "auto")
    listed = devices if isinstance(devices, list) else [part for part in str(devices).split(",") if part.strip()]
    if isinstance(devices, list) or "," in str(devices):
        count = len(listed)
    elif str(devices).isdigit():
        count = int(devices)
    else:
        on_gpu = trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
        count = torch.cuda.device_count() if on_gpu else 1
    return max(1, count) * _number(trainer, "num_nodes", 1)


def _number(trainer: dict[str, Any], key: str, default: int) -> int:
    value = trainer.get(key)
    return default if value is None else int(value)
