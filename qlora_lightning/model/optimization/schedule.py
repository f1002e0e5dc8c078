"""Builds a learning-rate schedule by its transformers name, for the optimizer steps that the run will have."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import SchedulerType, get_scheduler

from qlora_lightning.errors import UserError
from qlora_lightning.trainer import is_trial_run

# Schedules that look at a metric or at gradients do not fit «once per optimizer step».
_NEED_METRICS = {"reduce_lr_on_plateau", "greedy"}
_FEW_STEPS = 10


def count_optimizer_steps(
    batches_per_epoch: int, accumulate: int, max_epochs: int | None, max_steps: int | None
) -> int:
    """Count the optimizer steps of a run from plain numbers.

    Lightning's ``estimated_stepping_batches`` loads the data loader early, and a stateful loader then loses its place
    on resume: hence this arithmetic.

    Args:
        batches_per_epoch: Micro-batches of one epoch on one rank.
        accumulate: Micro-batches of one optimizer step; the last step of an epoch may have fewer.
        max_epochs: Epochs, or ``None`` or -1 for no limit.
        max_steps: Optimizer steps, or ``None`` or -1 for no limit.

    Raises:
        UserError: Neither limit is set.
    """
    limits = []
    if max_epochs is not None and max_epochs >= 0:
        limits.append(max_epochs * math.ceil(batches_per_epoch / accumulate))
    if max_steps is not None and max_steps >= 0:
        limits.append(max_steps)
    if not limits:
        raise UserError("A schedule needs an end: set trainer.max_epochs or trainer.max_steps.")
    return min(limits)


def plan_steps(trainer: Any) -> int:
    """Count the optimizer steps of a Trainer's whole run; see :func:`count_optimizer_steps`."""
    count_batches = getattr(getattr(trainer, "datamodule", None), "count_train_batches", None)
    if count_batches is None:
        return int(trainer.estimated_stepping_batches)
    batches, limit = count_batches(), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (limit or 1.0))
    return count_optimizer_steps(batches, trainer.accumulate_grad_batches, trainer.max_epochs, trainer.max_steps)


def describe_few_steps(trainer: Any, total_steps: int) -> str | None:
    """Describe a run that will train nothing, or has too few optimizer steps to learn from; else return ``None``.

    Steps that ``trainer.max_steps`` limits are what the user asked for.

    Args:
        trainer: About to fit.
        total_steps: Optimizer steps of the whole run.
    """
    if total_steps == 0:
        limits = {name: getattr(trainer, name) for name in ("max_epochs", "max_steps", "limit_train_batches")}
        zero = ", ".join(f"trainer.{name}" for name, value in limits.items() if value == 0)
        return f"Nothing will train: {zero or 'the number of training batches'} is 0. Set it to 1 or more."
    if total_steps >= _FEW_STEPS or total_steps == trainer.max_steps or is_trial_run(trainer):
        return None
    return (
        f"The run has only {total_steps} optimizer steps in all, too few for a warm-up and a schedule: for more raise "
        f"trainer.max_epochs (now {trainer.max_epochs}), or lower data.batch_size (or data.tokens_per_batch) or "
        f"trainer.accumulate_grad_batches (now {trainer.accumulate_grad_batches})."
    )


def check_schedule(choice: str | dict[str, Any], warmup_ratio: float) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a schedule; see :func:`build_schedule`.

    Raises:
        UserError: The name is unknown, or the warm-up is no share of the steps.
    """
    if not 0.0 <= warmup_ratio < 1.0:
        raise UserError(f"model.warmup_ratio is {warmup_ratio}: expected a share of the steps in [0, 1).")
    arguments: dict[str, Any] = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = arguments.pop("name", None)
    known = sorted({kind.value for kind in SchedulerType} - _NEED_METRICS)
    if name not in known:
        raise UserError(f"model.schedule is {choice!r}: expected a name among {', '.join(known)}.")
    return name, arguments


def build_schedule(
    optimizer: Optimizer, choice: str | dict[str, Any], total_steps: int, warmup_ratio: float
) -> LRScheduler:
    """Build one of transformers' schedules, to be stepped once per optimizer step.

    Args:
        optimizer: Whose learning rates it sets.
        choice: A name, or ``{"name": …, …}`` with the schedule's own arguments, as ``min_lr_rate``.
        total_steps: Optimizer steps of the whole run.
        warmup_ratio: Share of ``total_steps`` over which the rate rises from 0, rounded up to whole steps.

    Raises:
        UserError: The name is unknown, or an argument is missing or wrong.
    """
    name, arguments = check_schedule(choice, warmup_ratio)
    try:
        schedule: LRScheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=math.ceil(warmup_ratio * total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=arguments,
        )
        return schedule
    except (TypeError, ValueError) as error:
        raise UserError(
            f"model.schedule {name!r} does not take {arguments}: {error}. Give its arguments beside the name: "
            "`schedule: {name: …, …}`."
        ) from error
