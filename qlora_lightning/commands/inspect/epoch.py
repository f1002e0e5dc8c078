"""What an epoch costs: batches, how full they are, optimizer steps."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.support.errors import UserError

_DEFAULT_EPOCHS = 1  # as `fit` has it


@dataclass(frozen=True)
class Epoch:
    """One epoch of the training rows.

    Attributes:
        batches: micro-batches on each device.
        mean_tokens: tokens per micro-batch, on average.
        most_tokens: tokens of the largest micro-batch.
        budget: ``tokens_per_batch``; None where batches are made of rows.
        tokens: tokens of all rows.
        devices: on which micro-batches run side by side.
        accumulate: micro-batches per optimizer step.
        steps: optimizer steps per epoch.
        all_steps: optimizer steps of the whole run; None if nothing ends it.
        epochs: of the whole run; None if only steps end it.
        streaming: whether the rows are only the first ones of a stream, which has no epochs.
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

    @property
    def fill(self) -> float | None:
        """Share of the token budget that is used, all batches together."""
        return None if self.budget is None else self.mean_tokens / self.budget


def plan_epoch(plan: EpochPlan, trainer: dict[str, Any], streaming: bool = False) -> Epoch:
    """Count what the trainer's settings make of the first epoch.

    Args:
        plan: the training loader's, for one device.
        trainer: the trainer section of the config.
        streaming: whether these are only the first rows of a stream.

    Raises:
        UserError: a setting that is needed is not a number.
    """
    accumulate = _whole(trainer, "accumulate_grad_batches", 1)
    devices = count_devices(trainer)
    batches = _limit(len(replace(plan, world_size=devices)), trainer.get("limit_train_batches"))
    lengths = plan.samples.lengths
    batch_tokens = [int(lengths[batch.rows].sum()) for batch in plan.batches(0)]
    steps = math.ceil(batches / accumulate)
    max_steps = _whole(trainer, "max_steps", -1)
    epochs = _whole(trainer, "max_epochs", _DEFAULT_EPOCHS)
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
    return _devices_of_a_node(trainer) * _whole(trainer, "num_nodes", 1)


def _devices_of_a_node(trainer: dict[str, Any]) -> int:
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        return max(1, len(devices))
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text.isdigit():
        return max(1, int(text))
    here = torch.cuda.device_count() if trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") else 1
    return max(1, here)


def _limit(batches: int, limit: Any) -> int:
    """Apply ``limit_train_batches``: a number of batches, or a share of them."""
    if isinstance(limit, float):
        return int(batches * limit)
    return batches if limit is None else min(batches, int(limit))


def _whole(trainer: dict[str, Any], key: str, default: int) -> int:
    value = trainer.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"trainer.{key} is {value!r}: expected an integer.")
    if value < 1 and value != -1:
        raise UserError(f"trainer.{key} is {value}: expected 1 or more.")
    return value
