"""Lightning's counters of epochs, batches and validations: where a run is, and the few that a resume must correct.

Each counts what is ``ready``, ``started``, ``processed`` (trained on) and ``completed`` (with the hooks behind it).
"""

import math
from collections.abc import Mapping
from typing import Any

from lightning import Trainer

from qlora_lightning.support.errors import UserError


def batches_of(checkpoint: Mapping[str, Any]) -> Any:
    """Return the counters of training batches: ``total``, ``current`` (of the epoch) and ``is_last_batch`` (of it)."""
    return checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]


def is_end_of_step(checkpoint: Mapping[str, Any], accumulate: int) -> bool:
    """Whether a checkpoint is of the end of an optimizer step, to which so many micro-batches belong."""
    batches = batches_of(checkpoint)
    ready, processed = (batches["current"][name] for name in ("ready", "processed"))
    return bool(ready == processed and (ready % accumulate == 0 or batches["is_last_batch"]))


def align_validations(trainer: Trainer) -> None:
    """Let validations come between optimizer steps only: each judges, and saves, the adapter of a whole step.

    A share of an epoch is rounded down to whole windows of ``accumulate_grad_batches`` micro-batches.

    Raises:
        UserError: A number of batches, or of minutes, would lead into a window.
    """
    every, window, batches = trainer.val_check_batch, trainer.accumulate_grad_batches, trainer.num_training_batches
    if not trainer.enable_validation or window == 1 or every == math.inf:
        return
    if isinstance(trainer.val_check_interval, float) and every is not None and every < batches:
        trainer.val_check_batch = min(max(int(every) // window, 1) * window, int(batches))
        return
    if every is not None and trainer.check_val_every_n_epoch is None and batches != math.inf:
        every = math.gcd(int(every), int(batches))  # counted on over epochs, each of which begins a new window
    if every is None or (every % window and every < batches):
        raise UserError(
            f"trainer.val_check_interval {trainer.val_check_interval} leads into the middle of an optimizer step of "
            f"{window} micro-batches (trainer.accumulate_grad_batches). Set it to a share of the epoch, such as 0.25, "
            f"or to a multiple of {window}, with trainer.check_val_every_n_epoch: 1."
        )


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation is due after the batch that a Trainer has trained on."""
    every, every_epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every_epochs and (trainer.current_epoch + 1) % every_epochs):
        return False
    if every is None or every == math.inf:
        return bool(trainer.is_last_batch)
    batches = trainer.fit_loop.total_batch_idx if every_epochs is None else batch_idx
    return (batches + 1) % int(every) == 0


def ends_training(trainer: Trainer) -> bool:
    """Whether training ends with the batch that a Trainer has trained on.

    Lightning ends the epoch before ``on_train_end``, even in its middle: a longer run could not resume exactly from a
    checkpoint that is written there.
    """
    ends_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or ends_epoch or trainer.should_stop


def repeat_validation(checkpoint: Mapping[str, Any]) -> None:
    """Let a resume begin with the whole validation inside which a checkpoint is saved, if it is inside one.

    Lightning takes a validation up if one of its batches is in work. From a later batch than the first its counters
    would continue, while loader and metrics begin again.
    """
    validation = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    if not validation["is_last_batch"] or validation["current"]["completed"] < validation["current"]["ready"]:
        for counts in (validation["total"], validation["current"]):
            counts.update(ready=1, started=1, processed=0, completed=0)
        validation["is_last_batch"] = False


def lengthen_stream(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Let a stream, which is one epoch as long as ``max_steps``, continue behind the end that it had."""
    if checkpoint["global_step"] < trainer.max_steps:
        batches_of(checkpoint)["is_last_batch"] = False


def count_epoch(trainer: Trainer) -> None:
    """Count the epoch that has begun, if Lightning did not: after a resume at the end of the one before it.

    A checkpoint from inside such an epoch would be read as one from its end: the rest of it would be lost.
    """
    progress: Any = trainer.fit_loop.epoch_progress
    if progress.current.ready == progress.current.processed:
        progress.increment_ready()
        progress.increment_started()
