"""Checkpoints around a validation that is due: Lightning's own loop would skip it, or begin it in the middle."""

from typing import Any

from lightning import Trainer


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation is due after this batch: a checkpoint from before it would make a resume skip it."""
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


def rewind_validation(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint from inside a validation say that its very first batch is in work.

    From there Lightning takes a validation up before it trains on, and takes it from its first batch. From a later
    batch it would not: its counters go on there, while loader and metrics begin anew.

    Args:
        checkpoint: As the Trainer made it, between ``on_validation_start`` and ``on_validation_end``.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    before = progress["total"]["completed"] - progress["current"]["completed"]  # earlier validations of this epoch
    for counts, done in ((progress["total"], before), (progress["current"], 0)):
        counts.update(ready=done + 1, started=done + 1, processed=done, completed=done)
    progress["is_last_batch"] = False
