"""Lightning's counters of epochs, batches and validations: what those of a checkpoint say, and where they mislead.

Each counts what is ``ready``, ``started``, ``processed`` (trained on) and ``completed`` (with the hooks behind it).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning import Trainer


class Counters(NamedTuple):
    """Those of a checkpoint, with ``total`` and ``current`` (since the epoch or the validation began) each."""

    epochs: dict[str, Any]
    batches: dict[str, Any]
    validation: dict[str, Any]


def counters_of(checkpoint: Mapping[str, Any]) -> Counters:
    """Return the counters that lie in a checkpoint: what is changed in them is changed there."""
    loops = checkpoint["loops"]["fit_loop"]
    names = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
    return Counters(*(loops[name] for name in names))


# ---- what they say ---------------------------------------------------------------------------------------------------


def is_inside_batch(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a batch had been fetched and not trained on to its end, or an epoch was just about to start."""
    epoch, batch = (counts["current"] for counts in counters_of(checkpoint)[:2])
    return bool(epoch["ready"] > epoch["started"] or batch["ready"] > batch["processed"])


def is_inside_epoch(checkpoint: Mapping[str, Any]) -> bool:
    """Whether some of an epoch's batches, and not all, were trained on."""
    batches = counters_of(checkpoint).batches
    return bool(batches["current"]["completed"] and not batches["is_last_batch"])


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation is due after the batch that a Trainer has trained on."""
    every_epochs, interval = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not _validates_epoch(trainer, trainer.current_epoch):
        return False
    if interval is None or interval == float("inf"):
        return bool(trainer.is_last_batch)
    batches = trainer.fit_loop.total_batch_idx if every_epochs is None else batch_idx
    return (batches + 1) % int(interval) == 0


def ends_training(trainer: Trainer) -> bool:
    """Whether training ends with the batch that a Trainer has trained on.

    Lightning ends the epoch before ``on_train_end``, even in its middle: a longer run could not resume exactly from a
    checkpoint that is written there.
    """
    ends_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or ends_epoch or trainer.should_stop


def _validates_epoch(trainer: Trainer, epoch: int) -> bool:
    every_epochs = trainer.check_val_every_n_epoch
    return trainer.enable_validation and (every_epochs is None or (epoch + 1) % every_epochs == 0)


def _validates_end_of_epoch(trainer: Trainer, epoch: int, batches: int) -> bool:
    interval = trainer.val_check_interval
    every = interval if isinstance(interval, int) else max(1, int(batches * interval))
    ends = trainer.check_val_every_n_epoch is None or batches % every == 0
    return ends and _validates_epoch(trainer, epoch)


# ---- where they mislead ----------------------------------------------------------------------------------------------


def let_validation_follow(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Let a resume begin with the validation that is due, or that has begun, when a checkpoint is made.

    Lightning takes a validation up before it trains on if its very first batch is in work, so that is what the
    checkpoint is made to say. From a later batch its counters would continue, while loader and metrics begin again.
    """
    _, batches, validation = counters_of(checkpoint)
    current, done = batches["current"], validation["current"]["completed"]
    has_ended = validation["is_last_batch"] and done == validation["current"]["ready"]
    if trainer.validating and not has_ended:
        _rewind(validation, before=validation["total"]["completed"] - done)
    is_at_end = current["processed"] == current["completed"] + 1  # as long as on_train_batch_end lasts
    if trainer.training and is_at_end and validation_follows(trainer, current["processed"] - 1):
        _count_completed(batches, 1)
        _rewind(validation, before=validation["total"]["completed"])


def leave_validation_out(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Let a resume continue behind an epoch whose end was validated, if no validation ends it any more.

    Lightning then takes its first batch for one more of the epoch that is over. As the checkpoint of a run without
    validation is saved, in the epoch's last batch, it counts right.
    """
    epochs, batches, _ = counters_of(checkpoint)
    done = batches["current"]["completed"]
    is_behind_the_last = batches["is_last_batch"] and 0 < done == batches["current"]["ready"]
    if is_behind_the_last and not _validates_end_of_epoch(trainer, epochs["current"]["processed"], done):
        _count_completed(batches, -1)


def lengthen_stream(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Let a stream, which is one epoch as long as ``max_steps``, continue behind the end that it had."""
    if checkpoint["global_step"] < trainer.max_steps:
        counters_of(checkpoint).batches["is_last_batch"] = False


def count_epoch(trainer: Trainer) -> None:
    """Count the epoch that has begun, if Lightning did not: after a resume at the end of the one before it.

    A checkpoint from inside such an epoch would be read as one from its end: the rest of it would be lost.
    """
    progress: Any = trainer.fit_loop.epoch_progress
    if progress.current.ready == progress.current.processed:
        progress.increment_ready()
        progress.increment_started()


def _count_completed(batches: Mapping[str, Any], more: int) -> None:
    for counts in (batches["total"], batches["current"]):
        counts["completed"] += more


def _rewind(validation: dict[str, Any], before: int) -> None:
    """Put the first batch in work, behind those of the epoch's earlier validations."""
    for counts, done in ((validation["total"], before), (validation["current"], 0)):
        counts.update(ready=done + 1, started=done + 1, processed=done, completed=done)
    validation["is_last_batch"] = False
