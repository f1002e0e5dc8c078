"""Ends a command on a signal; training ends where it can be resumed exactly."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from qlora_lightning.support.console import say
from qlora_lightning.support.errors import TrainingStopped
from qlora_lightning.support.files import CHECKPOINTS, LAST

# Windows has no SIGHUP, the signal of a closed terminal, nor SIGUSR1, with which SLURM preempts
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class StopSignals(Callback):
    """Let Ctrl-C, SIGTERM, SIGHUP and SLURM's preemption signal end training after a step, with ``last.ckpt`` saved.

    Lightning ends inside the batch and saves nothing, or, under SLURM, saves inside it. Here a signal is only noted. At
    the end of the running optimizer step or validation, all ranks agree that one came to any of them, and
    :class:`AdapterCheckpoint` saves. Before the next batch, when loggers have the step's line,
    :class:`TrainingStopped` ends the fit. A second Ctrl-C ends it at once. Under SLURM with automatic requeueing the
    job is requeued. Signals that are ignored, as under ``nohup``, stay ignored. The evaluation after training,
    ``validate``, ``test`` and ``predict`` have nothing to save: a signal ends them at once.
    """

    stopping = False  # agreed by all ranks
    received: int | None = None  # the first signal that this process got
    _requeue_signal: int | None = None
    _signals: tuple[int, ...] = _SIGNALS
    _handlers: tuple[tuple[int, Any], ...] = ()  # from before the fit, to put back after its evaluation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.received, self.stopping = None, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_sanity_check_start(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning."""
        environment = trainer._accelerator_connector.cluster_environment  # public only with several processes
        if isinstance(environment, SLURMEnvironment) and environment.requeue_signal is not None:
            self._signals = (*_SIGNALS, environment.requeue_signal)
            self._requeue_signal = environment.requeue_signal if environment.auto_requeue else None

        def note(number: int, frame: FrameType | None) -> None:
            if self.received is None:
                self.received = number
                if trainer.is_global_zero:  # not by print, which the signal may have interrupted
                    name = signal.Signals(number).name
                    text = f"\n{name}: saving at the end of this step or validation. Ctrl-C leaves without saving.\n"
                    os.write(2, text.encode())
            elif number == signal.SIGINT:
                raise KeyboardInterrupt

        _handle((signal.SIGINT, *self._signals), note)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """End the fit if all ranks agreed to stop, and report how to resume it."""
        if not self.stopping:
            return
        last = Path(trainer.default_root_dir) / CHECKPOINTS / LAST
        remedy = "To resume a fit, add `--ckpt_path last` to the same command."
        saved = f", saved in {last}. {remedy}" if last.exists() else ". Nothing was saved."
        self.end(trainer, f"Stopped at step {trainer.global_step} in epoch {trainer.current_epoch}{saved}")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.on_train_batch_start(trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.window.vote("stop", self.received is not None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not pl_module.window.batches:  # else the accumulation window is still open
            self.stopping = self.stopping or pl_module.window.any_voted("stop")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._agree(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._agree(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._agree(trainer)
        if self.stopping:  # the signal came with the last batch, or since: skip what follows training
            self.end(trainer, "Training had come to its end, and all is saved.")
        self._handlers = tuple((number, signal.getsignal(number)) for number in self._signals)  # put back by Lightning
        self._end_at_signals(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._handlers:
            _handle([number], handler)
        self._handlers = ()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
        is_requeued = isinstance(exception, TrainingStopped) and exception.code == 128 + (self._requeue_signal or 0)
        if is_requeued and trainer.is_global_zero:
            array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID", "")
            name = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
            subprocess.run(["scontrol", "requeue", name], check=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._end_at_signals(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_at_signals(trainer)

    on_predict_start = on_test_start

    def _agree(self, trainer: Trainer) -> None:
        self.stopping = self.stopping or trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)

    def end(self, trainer: Trainer, message: str) -> NoReturn:
        """End with the code of the signal, after a last message."""
        number = int(self.received or signal.SIGTERM)  # the signal may have come to another rank
        if trainer.is_global_zero:
            say(message)
        raise TrainingStopped(128 + number)

    def _end_at_signals(self, trainer: Trainer) -> None:
        """Let signals end the process where it is."""

        def end(number: int, frame: FrameType | None) -> None:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(number)  # processes that this one started
            raise TrainingStopped(128 + number)

        _handle(self._signals, end)


def _handle(numbers: Iterable[int], handler: Any) -> None:
    """Handle signals that are not ignored, until Lightning restores the earlier handlers."""
    if threading.current_thread() is threading.main_thread():  # Python allows it only there
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP, and a shell's `&` Ctrl-C
                signal.signal(number, handler)


def was_requeued() -> bool:
    """Whether SLURM has restarted this job, which then resumes whatever its command says."""
    return SLURMEnvironment.detect() and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
