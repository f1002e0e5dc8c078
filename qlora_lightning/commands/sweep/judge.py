"""Judges a trial at its end: the best adapter, on each validation row."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from lightning import Callback, LightningModule, Trainer

from qlora_lightning.callbacks import AdapterCheckpoint, StopSignals
from qlora_lightning.commands.sweep.row_losses import RowLosses, judge_rows
from qlora_lightning.model.adapters.identity import identity_of_data
from qlora_lightning.model.adapters.lora import copy_tensors, trainable_tensors
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import callbacks_of


class TrialJudge(Callback):
    """Refuse a trial without validation rows or with another adapter, and judge it when its training has ended.

    Args:
        check_built: Told of the module when its model is made.

    Attributes:
        rows: Losses of the validation rows; ``None`` until they are judged.
        parameters: That train.
        steps: Optimizer steps that were taken.
        seconds: Of the training; ``None`` where another process began it.
        validation: Hash of the validation samples, where the data module knows one.
    """

    def __init__(self, check_built: Callable[[Any], None]) -> None:
        self._check_built = check_built
        self.rows: RowLosses | None = None
        self.parameters = self.steps = 0
        self.seconds: float | None = None
        self.validation: str | None = None
        self._began: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        samples = getattr(getattr(trainer, "datamodule", None), "samples", None)
        if (isinstance(samples, dict) and "val" not in samples) or not trainer.limit_val_batches:
            raise UserError(
                "A sweep compares trials on validation rows, and there are none: name a file in data.val, or hold "
                "some out by data.val_fraction: 0.1 (and leave trainer.limit_val_batches above 0)."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_built(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic() if trainer.global_step == 0 else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = None if self._began is None else time.monotonic() - self._began

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            raise UserError("No optimizer step was taken: trainer.limit_train_batches and max_steps must not be 0.")
        writer = next((each for each in callbacks_of(trainer) if isinstance(each, AdapterCheckpoint)), None)
        best = writer.read_best(trainer.default_root_dir) if writer else None
        if best is not None:
            copy_tensors(pl_module, best, "The best adapter")
        self.parameters = sum(tensor.numel() for tensor in trainable_tensors(pl_module).values())
        self.steps = trainer.global_step
        self.validation = identity_of_data(trainer).get("val")
        self.rows = judge_rows(pl_module, _batches(trainer), trainer.strategy.batch_to_device)


def _batches(trainer: Any) -> Iterator[Any]:
    """Give the validation batches, as many as the trainer validates on, until a signal asks to stop."""
    # Where nothing was left to train, the trainer has made no loader.
    loader = trainer.val_dataloaders or trainer.datamodule.val_dataloader()
    limit = trainer.limit_val_batches
    most = limit if isinstance(limit, int) else int(len(loader) * limit)
    stop = next((each for each in callbacks_of(trainer) if isinstance(each, StopSignals)), None)
    for batch in itertools.islice(iter(loader), most):
        if stop is not None and stop.received is not None:
            stop.end(trainer, "Stopped while the trial was judged.")
        yield batch
