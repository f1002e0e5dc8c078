"""Where in a run a checkpoint is saved, and what Lightning's loops must be told to go on from there.

Left alone, Lightning skips a validation that is due but has not ended, loses an epoch whose start has just been told,
and loses a batch that has been fetched but not trained on.
"""

from typing import Any

from lightning import Trainer


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation is due after this batch."""
    if not trainer.enable_validation:
        return False
    every_epochs = trainer.check_val_every_n_epoch
    if every_epochs is not None and (trainer.current_epoch + 1) % every_epochs:
        return False
    interval = trainer.val_check_batch
    if interval is None or interval == float("inf"):
        return bool(trainer.is_last_batch)
    batches = trainer.fit_loop.total_batch_idx if every_epochs is None else batch_idx
    return (batches + 1) % int(interval) == 0


def ends_training(trainer: Trainer) -> bool:
    """Whether training ends with this batch.

    Lightning ends the epoch before ``on_train_end``, even in its middle: a longer run could not go on exactly from a
    checkpoint that is written there.
    """
    ends_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or ends_epoch or trainer.should_stop


def is_inside_batch(checkpoint: dict[str, Any]) -> bool:
    """Whether a batch had been fetched and not trained on to its end, or an epoch was just about to start."""
    loops = checkpoint["loops"]["fit_loop"]
    epoch, batch = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
    return bool(epoch["ready"] > epoch["started"] or batch["ready"] > batch["processed"])


def let_validation_follow(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a resume begin with the validation that was due, or that had begun, when the checkpoint was made.

    Lightning takes a validation up before it trains on where its very first batch is in work, so that is what the
    checkpoint is made to say. From a later batch its counters would go on, while loader and metrics begin anew.

    Args:
        trainer: Who makes the checkpoint.
        checkpoint: As the trainer made it.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    done = validation["current"]["completed"]
    if trainer.validating:
        ended = validation["is_last_batch"] and done == validation["current"]["ready"]
        if not ended:
            _rewind(validation, before=validation["total"]["completed"] - done)
    elif trainer.training:
        current = batches["current"]
        ends = current["processed"] == current["completed"] + 1  # as long as on_train_batch_end lasts
        if ends and validation_follows(trainer, current["processed"] - 1):
            for counts in (batches["total"], current):
                counts["completed"] += 1
            _rewind(validation, before=validation["total"]["completed"])


def leave_validation_out(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a resume go on behind an epoch whose end was validated, where no validation ends it any more.

    Lightning then takes its first batch for one more of the epoch that is over. As the checkpoint of a run without
    validation is saved, in the epoch's last batch, it counts right.

    Args:
        trainer: Who is about to resume.
        checkpoint: As it was loaded.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epoch = loops["epoch_loop.batch_progress"], loops["epoch_progress"]["current"]
    current = batches["current"]
    is_behind_the_last = batches["is_last_batch"] and 0 < current["completed"] == current["ready"]
    if is_behind_the_last and not _validates_end_of_epoch(trainer, epoch["processed"], current["ready"]):
        for counts in (batches["total"], current):
            counts["completed"] -= 1


def lengthen_stream(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a stream, which is one epoch as long as ``max_steps``, go on behind the end that it had.

    Args:
        trainer: Who is about to resume.
        checkpoint: As it was loaded.
    """
    if checkpoint["global_step"] < trainer.max_steps:
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False


def _validates_end_of_epoch(trainer: Trainer, epoch: int, batches: int) -> bool:
    every_epochs, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    if not trainer.enable_validation or (every_epochs is not None and (epoch + 1) % every_epochs):
        return False
    every = interval if isinstance(interval, int) else max(1, int(batches * interval))
    return every_epochs is None or batches % every == 0


def count_epoch(trainer: Trainer) -> None:
    """Count the epoch that has begun, where Lightning did not: after a resume at the end of the one before it.

    A checkpoint from inside such an epoch would be read as one from its end: the rest of it would be lost.

    Args:
        trainer: At the start of a batch.
    """
    progress: Any = trainer.fit_loop.epoch_progress
    if progress.current.ready == progress.current.processed:
        progress.increment_ready()
        progress.increment_started()


def _rewind(progress: dict[str, Any], before: int) -> None:
    """Put the first batch in work, behind those of the epoch's earlier validations."""
    for counts, done in ((progress["total"], before), (progress["current"], 0)):
        counts.update(ready=done + 1, started=done + 1, processed=done, completed=done)
    progress["is_last_batch"] = False
