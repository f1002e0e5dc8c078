"""Progress of a run: a bar in a terminal, or lines in a log file."""

import math
import sys
import time
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.progress import TextColumn, TimeRemainingColumn

from qlora_lightning.support.console import say, terminal
from qlora_lightning.support.files import MEMORY_PEAKS
from qlora_lightning.support.trainer import planned_steps

_FORMATS = {
    "train_loss": ("loss", ".3f"),
    "val_loss": ("val", ".3f"),
    "learning_rate": ("lr", ".1e"),
    "tokens_per_second": ("tok/s", ".0f"),
    **dict.fromkeys(MEMORY_PEAKS, ("GiB", ".2f")),
}


def choose_progress_display() -> ProgressBar:
    """Return the bar if standard output is a terminal that can redraw a line, else the lines."""
    return ShortProgressBar() if sys.stdout.isatty() and terminal().is_interactive else ProgressLines()


class ShortProgressBar(RichProgressBar):
    """Lightning's rich progress bar without what leaves no room for the metrics in a terminal of 80 columns."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        steps = TextColumn("{task.description} {task.completed:.0f}/{task.total:.0f}")
        return [steps, TimeRemainingColumn(compact=True)]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return _format_metrics(trainer)


class ProgressLines(ProgressBar):
    """A plain line after the first step, the last one, and every so many seconds: for an output that is no terminal."""

    def __init__(self, every_seconds: float = 30.0) -> None:
        super().__init__()
        self._every, self._enabled = every_seconds, True

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:  # as Lightning does on all ranks but the first
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._printed_at, self._total = time.monotonic(), -math.inf, planned_steps(trainer)
        self._first_step = self._printed_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if time.monotonic() - self._printed_at >= self._every:
            self._print_step(trainer)  # of the step before: now all callbacks have logged it
        epoch, max_epochs = trainer.current_epoch + 1, trainer.max_epochs  # at the end Lightning has counted one more
        self._epoch = f"epoch {epoch}/{max_epochs}" if max_epochs is not None and max_epochs > 0 else f"epoch {epoch}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_step(trainer)

    def _print_step(self, trainer: Trainer) -> None:
        step, total = trainer.global_step, self._total
        if step == self._printed_step or not self._enabled:
            return
        self._printed_step, self._printed_at = step, time.monotonic()
        parts = [f"step {step}/{total or '?'}", self._epoch, *map(" ".join, _format_metrics(trainer).items())]
        if total is not None:
            seconds_per_step = (time.monotonic() - self._began) / (step - self._first_step)
            parts.append(f"{timedelta(seconds=round(seconds_per_step * max(0, total - step)))} left")
        say(", ".join(parts))


def _format_metrics(trainer: Trainer) -> dict[str, str]:
    """Format the metrics of the progress bar, and the learning rate, by short names."""
    metrics = dict(trainer.progress_bar_metrics)
    if "learning_rate" in trainer.callback_metrics:
        metrics["learning_rate"] = float(trainer.callback_metrics["learning_rate"])
    formats = _FORMATS | {name: (name, ".3f") for name in metrics if name not in _FORMATS}
    return {label: f"{float(metrics[name]):{form}}" for name, (label, form) in formats.items() if name in metrics}
