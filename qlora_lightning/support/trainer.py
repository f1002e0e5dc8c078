"""Attributes of a Trainer that its class does not declare, its planned steps, and its processes."""

import atexit
import math
import time
from typing import Any, TypeVar, cast

import torch.distributed
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_only

from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError

say_once = rank_zero_only(say)  # one line for all processes
Item = TypeVar("Item")
CallbackT = TypeVar("CallbackT", bound=Callback)


def trainer_of(module: Any) -> Trainer | None:
    """Return the Trainer that a module is attached to, ``None`` without one.

    Without one, Lightning's ``trainer`` raises; under Fabric it is not a Trainer.
    """
    if module.fabric is not None:
        return None
    try:
        trainer: Trainer = module.trainer
    except RuntimeError:
        return None
    return trainer


def datamodule_of(trainer: Any) -> Any:
    """Return the data module of a Trainer; ``None`` without one, and without a Trainer."""
    return getattr(trainer, "datamodule", None)


def split_of_pass(module: LightningModule) -> tuple[Any, str | None]:
    """Return the data module, and the split whose rows go through a module now; ``None`` for both if unknown."""
    trainer = trainer_of(module)
    stage = None if trainer is None else trainer.state.stage
    if stage == RunningStage.TRAINING and not torch.is_grad_enabled():  # a fit's last evaluation
        stage = None
    splits = {RunningStage.TRAINING: "train", RunningStage.VALIDATING: "val", RunningStage.TESTING: "test"}
    splits[RunningStage.SANITY_CHECKING] = "val"
    return (datamodule_of(trainer), splits[stage]) if stage in splits else (None, None)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks, in the order in which they are called."""
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    return callbacks


def find_callback(trainer: Trainer, kind: type[CallbackT]) -> CallbackT | None:
    """Return the first callback of a class, if there is one."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


def is_trial_run(trainer: Trainer) -> bool:
    """Whether ``fast_dev_run`` is set: a few batches that write nothing."""
    return bool(cast(Any, trainer).fast_dev_run)


def planned_steps(trainer: Any) -> int | None:
    """Count the optimizer steps of the whole run, on one rank; ``None`` if only time ends it.

    Lightning's ``estimated_stepping_batches`` loads the data loader early: a stateful loader then loses its position
    on resume.
    """
    batches = batches_of_epoch(trainer)
    if batches is None:
        steps = trainer.estimated_stepping_batches
        return int(steps) if 0 <= steps < math.inf else None
    return steps_of_run(math.ceil(batches / trainer.accumulate_grad_batches), trainer.max_epochs, trainer.max_steps)


def check_steps(trainer: Any, needs_end: bool = True) -> int | None:
    """Return the steps of a run, ``None`` if its end is unknown; reject that if ``needs_end``, and a run of no step."""
    steps, key = planned_steps(trainer), "trainer.max_steps"
    if steps is None and not needs_end:
        return None
    if steps is None and trainer.max_epochs != -1:
        raise UserError(
            "The training data do not tell how many batches an epoch has, so trainer.max_epochs does not tell how many "
            "steps the run has, and the learning rate's schedule needs them. Set trainer.max_steps.",
            key,
        )
    if steps is None:
        raise UserError(
            "The run has no end: the learning rate's schedule needs one of trainer.max_epochs and trainer.max_steps, "
            "also beside trainer.max_time. Set one of them, or model.schedule to constant and model.warmup to a number "
            "of steps or 0.",
            key,
        )
    if not steps:
        raise UserError(
            "The run takes no step: trainer.max_epochs or trainer.max_steps is 0, or an epoch has no batch by "
            "trainer.limit_train_batches. Raise it.",
            key,
        )
    return steps


def batches_of_epoch(trainer: Any) -> int | None:
    """Count the batches of an epoch on one rank, without a loader; ``None`` if the data module does not know them."""
    count_batches = getattr(datamodule_of(trainer), "count_train_batches", None)
    return None if count_batches is None else limit_batches(count_batches(), trainer.limit_train_batches)


def limit_batches(batches: int, limit: int | float | None) -> int:
    """Apply ``trainer.limit_train_batches``, a number or a share, to the batches of an epoch."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))


def steps_of_run(steps_of_epoch: int, max_epochs: int | None, max_steps: int | None) -> int | None:
    """Return a run's optimizer steps; ``None`` if neither limit ends it: ``None`` and -1 mean no limit."""
    epochs, steps = (-1 if limit is None else limit for limit in (max_epochs, max_steps))
    return min((limit for limit in (epochs * steps_of_epoch, steps) if limit >= 0), default=None)


def steps_to_validation(batches: int, window: int, interval: int | float, every_n_epochs: int | None) -> int:
    """Count the optimizer steps of a run up to its first validation.

    Args:
        batches: Batches of an epoch.
        window: Batches of a step, ``trainer.accumulate_grad_batches``.
        interval: ``trainer.val_check_interval``, a number of batches or a share; it is rounded down to whole steps.
        every_n_epochs: ``trainer.check_val_every_n_epoch``; with ``None`` the interval is counted across epochs.
    """
    n_batches = interval if isinstance(interval, int) else int(batches * interval)
    steps_of_epoch = math.ceil(batches / window)
    steps = steps_of_epoch if n_batches == batches else max(n_batches // window, 1)
    return steps if every_n_epochs is None else (every_n_epochs - 1) * steps_of_epoch + steps


def validation_follows(trainer: Trainer) -> bool:
    """Whether a validation is due after the batch that a Trainer has trained on, as far as that is known."""
    every_n_batches, every_n_epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every_n_epochs and (trainer.current_epoch + 1) % every_n_epochs):
        return False
    if every_n_batches is None:  # by the clock
        return False
    if every_n_batches == math.inf:
        return bool(trainer.is_last_batch)
    last_batch = trainer.fit_loop.total_batch_idx if every_n_epochs is None else trainer.fit_loop.batch_idx
    return (last_batch + 1) % int(every_n_batches) == 0


def gather_lists(trainer: Trainer, items: list[Item]) -> list[Item]:
    """Return, in every process, the lists of all processes concatenated in the order of ranks."""
    if trainer.world_size == 1:
        return items
    lists: list[list[Item]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(lists, items)
    return [item for rank_items in lists for item in rank_items]


def leave_processes_at_exit() -> None:
    """Leave the group of processes before the interpreter ends; Lightning does so for NCCL alone.

    A thread of gloo that frees its last tensor after that would abort the process.
    """
    atexit.unregister(_leave_processes)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        atexit.register(_leave_processes)


def _leave_processes() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        # that waits for the threads, unless something still refers to the group, as DDP does: let them have Python
        time.sleep(0.1)
