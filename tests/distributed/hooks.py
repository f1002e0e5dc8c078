"""Callbacks that the launched runs name in their configs, by this module's name alone."""

import os
import signal
import time
from pathlib import Path

from lightning import Callback
from lightning.pytorch.callbacks import Checkpoint


class SaveAt(Checkpoint):  # which Lightning calls after all other callbacks
    """Save after some batches of the run, wherever in an accumulation window they lie."""

    def __init__(self, batches: list[int], folder: str):
        self.batches, self.folder = batches, Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        number = trainer.fit_loop.total_batch_idx + 1
        if number in self.batches:
            trainer.save_checkpoint(self.folder / f"{number}.ckpt", weights_only=False)


class Die(Callback):
    """Kill one rank after its second batch; the others wait, or go on, which leads them into the next exchange."""

    def __init__(self, rank: int, others_sleep: float = 0.0):
        self.rank, self.others_sleep = rank, others_sleep

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            if trainer.global_rank == self.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            Path(f"pid-{trainer.global_rank}").write_text(str(os.getpid()))
            time.sleep(self.others_sleep)


class Ask(Callback):
    """Send a signal to one rank when a batch of training or of a validation begins."""

    def __init__(self, rank: int, batch: int, validation: bool = False, number: int = int(signal.SIGTERM)):
        self.rank, self.batch, self.validation, self.number = rank, batch, validation, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.validation and trainer.fit_loop.total_batch_idx == self.batch:
            self._ask(trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.validation and batch_idx == self.batch:
            self._ask(trainer)

    def _ask(self, trainer):
        if trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class DieOnce(Callback):
    """Kill the last rank after its third batch, in the first attempt at a run."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2 and trainer.global_rank == trainer.world_size - 1 and not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
