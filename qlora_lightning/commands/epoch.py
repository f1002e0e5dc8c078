"""What an epoch of a config takes, for ``inspect`` and ``plan``: batches, optimizer steps and tokens."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.support.trainer import limit_batches, steps_of_run


@dataclass(frozen=True)
class Epoch:
    """Size of an epoch of the training rows, and of the whole run."""

    batches: int  # on each device
    devices: int  # of all nodes, on which batches run side by side
    tokens: int  # of all rows
    steps: int  # optimizer steps per epoch
    all_steps: int | None  # of the run; None if nothing ends it
    all_tokens: int | None  # of the run, approximately


def plan_epoch(plan: EpochPlan, trainer: Mapping[str, Any]) -> Epoch:
    """Count epoch and run from a plan for one device, under the Trainer's settings with their defaults."""
    devices = count_devices(trainer)
    batches = limit_batches(len(replace(plan, world_size=devices)), trainer["limit_train_batches"])
    steps = math.ceil(batches / trainer["accumulate_grad_batches"])
    all_steps = steps_of_run(steps, trainer["max_epochs"], trainer["max_steps"])
    batch_tokens = [int(plan.samples.lengths[batch.rows].sum()) for batch in plan.batches(0)]
    step_tokens = batches * devices * sum(batch_tokens) / max(1, len(batch_tokens) * steps)  # on average
    all_tokens = None if all_steps is None else round(all_steps * step_tokens)
    return Epoch(batches, devices, sum(batch_tokens), steps, all_steps, all_tokens)


def count_devices(trainer: Mapping[str, Any]) -> int:
    """Count the devices of all nodes that ``trainer.devices`` asks for: a number, a list, or all of this machine."""
    devices = str(trainer["devices"])
    if devices in ("auto", "-1"):
        count = torch.cuda.device_count() if trainer["accelerator"] in ("auto", "gpu", "cuda") else 1
    else:
        count = int(devices) if devices.isdigit() else len(re.findall(r"\d+", devices))  # "0,1," or [0, 1]
    return max(1, count) * int(trainer["num_nodes"])
