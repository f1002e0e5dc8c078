"""Callbacks that time training and validation, and note the rows of each batch."""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from qlora_lightning.model.batch import BatchShape, shape_of_batch
from tests.benchmarks.children import seconds_since_spawn
from tests.benchmarks.figures import read_peak_bytes


class Meter(Callback):
    """Time the training loop and each step; note batches, losses, the start and the most memory.

    On a card the loop is timed from behind the first step, which compiles kernels.
    """

    def __init__(self) -> None:
        self.batches: list[BatchShape] = []
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.seconds = self.start_seconds = 0.0
        self.peak_bytes = 0
        self._began = self._step_began = 0.0
        self._on_gpu = False

    @property
    def tokens(self) -> int:
        """Tokens of all batches in :attr:`seconds`."""
        return sum(batch.tokens for batch in self.batches[self._on_gpu :])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._on_gpu = pl_module.device.type == "cuda"
        self._began = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.start_seconds = self.start_seconds or seconds_since_spawn()
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(trainer.callback_metrics["train_loss"].item())  # waits for a card to be done
        self.step_seconds.append(time.perf_counter() - self._step_began)
        self.batches.append(shape_of_batch(batch))
        if self._on_gpu and batch_idx == 0:
            self._began = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self._began
        self.peak_bytes = read_peak_bytes(self._on_gpu)


class ValidationMeter(Callback):
    """Time a validation pass."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.callback_metrics["val_loss"].item()  # waits for a card to be done
        self.seconds = time.perf_counter() - self._began
