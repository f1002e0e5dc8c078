"""Lightning's counters of epochs, batches and validations: where a run is, and the few that a resume must correct.

Each counts what is ``ready``, ``started``, ``processed`` (trained on) and ``completed`` (with the hooks behind it).
"""

from collections.abc import Mapping
from typing import Any

from lightning import Trainer

_EPOCHS, _BATCHES = "epoch_progress", "epoch_loop.batch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"


def _counts(checkpoint: Mapping[str, Any], name: str) -> Any:
    """Return counters of a checkpoint themselves: ``total`` and ``current``, since the epoch or validation began."""
    return checkpoint["loops"]["fit_loop"][name]


# ---- where a run is --------------------------------------------------------------------------------------------------


def is_inside_batch(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a batch had been fetched and not trained on to its end, or an epoch was just about to start."""
    epoch, batch = (_counts(checkpoint, name)["current"] for name in (_EPOCHS, _BATCHES))
    return bool(epoch["ready"] > epoch["started"] or batch["ready"] > batch["processed"])


def is_inside_epoch(checkpoint: Mapping[str, Any]) -> bool:
    """Whether some of an epoch's batches, and not all, were trained on."""
    batches = _counts(checkpoint, _BATCHES)
    return bool(batches["current"]["completed"] and not batches["is_last_batch"])


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation is due after the batch that a Trainer has trained on."""
    if trainer.val_check_batch in (None, float("inf")):
        return bool(trainer.is_last_batch) and _validates_epoch(trainer, trainer.current_epoch)
    return _is_validation_due(trainer, trainer.current_epoch, batch_idx, trainer.fit_loop.total_batch_idx)


def window_has_validation(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation is due inside the window that begins after the batch that a Trainer has trained on.

    A window is ``accumulate_grad_batches`` micro-batches, and the end of an epoch ends it; a validation at its end is
    not inside it.
    """
    epoch, first = trainer.current_epoch, batch_idx + 1
    if trainer.is_last_batch:
        epoch, first = epoch + 1, 0
    if trainer.val_check_batch in (None, float("inf")):
        return False
    last = min(first + trainer.accumulate_grad_batches, trainer.num_training_batches) - 1
    before = trainer.fit_loop.total_batch_idx + 1 - first
    return any(_is_validation_due(trainer, epoch, idx, before + idx) for idx in range(first, int(last)))


def ends_training(trainer: Trainer) -> bool:
    """Whether training ends with the batch that a Trainer has trained on.

    Lightning ends the epoch before ``on_train_end``, even in its middle: a longer run could not resume exactly from a
    checkpoint that is written there.
    """
    ends_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or ends_epoch or trainer.should_stop


def _is_validation_due(trainer: Trainer, epoch: int, batch_idx: int, total_batch_idx: int) -> bool:
    batches = total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return (batches + 1) % int(trainer.val_check_batch or 1) == 0 and _validates_epoch(trainer, epoch)


def _validates_epoch(trainer: Trainer, epoch: int) -> bool:
    every_epochs = trainer.check_val_every_n_epoch
    return trainer.enable_validation and (every_epochs is None or (epoch + 1) % every_epochs == 0)


# ---- what a resume must correct --------------------------------------------------------------------------------------


def repeat_validation(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Let a resume begin with the whole validation inside which a checkpoint is saved.

    Lightning takes a validation up if one of its batches is in work. From a later batch than the first its counters
    would continue, while loader and metrics begin again.
    """
    validation = _counts(checkpoint, _VALIDATION)
    current = validation["current"]
    has_ended = validation["is_last_batch"] and current["completed"] == current["ready"]
    if trainer.validating and not has_ended:
        for counts in (validation["total"], current):
            counts.update(ready=1, started=1, processed=0, completed=0)
        validation["is_last_batch"] = False


def leave_validation_out(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Let a resume continue behind an epoch whose end was validated, if no validation ends it any more.

    Lightning then takes its first batch for one more of the epoch that is over. As a checkpoint of a run without
    validation is saved, in the epoch's last batch, it counts right.
    """
    batches, epoch = _counts(checkpoint, _BATCHES), _counts(checkpoint, _EPOCHS)["current"]["processed"]
    done, interval = batches["current"]["completed"], trainer.val_check_interval
    if not batches["is_last_batch"] or not 0 < done == batches["current"]["ready"]:
        return
    every = interval if isinstance(interval, int) else max(1, int(done * interval))
    ends_epoch = trainer.check_val_every_n_epoch is None or done % every == 0
    if not (ends_epoch and _validates_epoch(trainer, epoch)):
        batches["total"]["completed"] -= 1
        batches["current"]["completed"] -= 1


def lengthen_stream(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Let a stream, which is one epoch as long as ``max_steps``, continue behind the end that it had."""
    if checkpoint["global_step"] < trainer.max_steps:
        _counts(checkpoint, _BATCHES)["is_last_batch"] = False


def count_epoch(trainer: Trainer) -> None:
    """Count the epoch that has begun, if Lightning did not: after a resume at the end of the one before it.

    A checkpoint from inside such an epoch would be read as one from its end: the rest of it would be lost.
    """
    progress: Any = trainer.fit_loop.epoch_progress
    if progress.current.ready == progress.current.processed:
        progress.increment_ready()
        progress.increment_started()
