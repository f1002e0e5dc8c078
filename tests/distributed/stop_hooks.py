"""A callback that the launched runs name in their configs: a signal that one process gets before the others."""

import os
import signal

from lightning import Callback


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
