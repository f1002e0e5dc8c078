"""Callbacks that the launched runs name in their configs, by this module's name alone."""

import os
import signal
import subprocess
import time
from pathlib import Path

from lightning import Callback
from lightning.pytorch.callbacks import Checkpoint

from qlora_lightning.callbacks import StopSignals


class SaveAt(Checkpoint):  # which Lightning calls after all other callbacks
    """Save after some batches of the run, wherever in an accumulation window they lie."""

    def __init__(self, batches: list[int], folder: str):
        self.batches, self.folder = batches, Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        number = trainer.fit_loop.total_batch_idx + 1
        if number in self.batches:
            trainer.save_checkpoint(self.folder / f"{number}.ckpt", weights_only=False)


class Die(Callback):
    """End one rank after its second batch; the others wait, or go on, which leads them into the next exchange."""

    def __init__(self, rank: int, error: str | None = None, others_sleep: float = 0.0):
        self.rank, self.error, self.others_sleep = rank, error, others_sleep

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            Path(f"pid-{trainer.global_rank}").write_text(str(os.getpid()))
            trainer.strategy.barrier()
            if trainer.global_rank != self.rank:
                time.sleep(self.others_sleep)
            elif self.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise ValueError(self.error)


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


class Call(Callback):
    """Run a command when a batch of the run begins, and wait for the signal that it leads to."""

    def __init__(self, commands: dict[int, list[str]]):
        self.commands = commands

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        command = self.commands.get(trainer.fit_loop.total_batch_idx)
        if command and trainer.is_global_zero:
            subprocess.run([os.path.expandvars(word) for word in command])  # which the signal may reach too
            (stop,) = (each for each in trainer.callbacks if isinstance(each, StopSignals))
            while stop.received is None:
                time.sleep(0.1)


class LoseMachine(Callback):
    """Kill this process and its launcher at the batch that the environment names."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if str(batch_idx) == os.environ.get("LOST_AT_BATCH"):
            for process in (os.getppid(), os.getpid()):
                os.kill(process, signal.SIGKILL)
