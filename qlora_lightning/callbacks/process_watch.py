"""Ends a process whose parent, the first process of a run, has died: nobody else would."""

import os
import sys
import threading

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

_EVERY = 2.0  # seconds
_GRACE = 5.0  # seconds for a process that is about to end by itself


class ProcessWatch(Callback):
    """Watch over the process that started this one.

    Lightning's first process watches those that it started, and torchrun watches all of them. When the first process
    dies, the others would sit in their next exchange until its timeout, and hold their GPUs.
    """

    def __init__(self) -> None:
        self._done = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0:
            self._done.clear()
            arguments = (os.getppid(), trainer.global_rank)
            threading.Thread(target=self._watch, args=arguments, daemon=True, name="process-watch").start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._done.set()

    def _watch(self, parent: int, rank: int) -> None:
        while not self._done.wait(_EVERY):
            if os.getppid() != parent:
                if not self._done.wait(_GRACE):
                    print(f"qlora-lightning: the first process is gone, so process {rank} ends too.", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(1)  # the main thread waits in an exchange that no exception can interrupt
                return
