"""Callbacks that the launched runs name in their configs."""

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
