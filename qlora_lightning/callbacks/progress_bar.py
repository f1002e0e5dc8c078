"""Progress of a run: a bar that fits into a terminal of 80 columns, or a line now and then in a log file."""

import sys
import time
from datetime import timedelta
from typing import Any

import rich
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.progress import BarColumn, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from qlora_lightning.callbacks.run_report import planned_steps
from qlora_lightning.support.console import drop_lost_output
from qlora_lightning.support.versions import PEAK_NAMES

# metric: (in the bar, in a line of a log); the most important first, for a narrow terminal cuts the last ones
_FORMATS = {
    "train_loss": ("loss {:.3f}", "loss {:.4f}"),
    "val_loss": ("val {:.3f}", "val_loss {:.4f}"),
    "learning_rate": ("lr {:.1e}", "learning rate {:.3g}"),
    "tokens_per_second": ("{:.0f} tok/s", "{:,.0f} tokens/s"),
    **dict.fromkeys(PEAK_NAMES.values(), ("{:.2f} GiB", "{:.2f} GiB")),
}


def choose_progress_display() -> ProgressBar:
    """Return the bar if standard output is a terminal that can redraw a line, else the lines."""
    return ShortProgressBar() if sys.stdout.isatty() and rich.get_console().is_interactive else ProgressLines()


class ShortProgressBar(RichProgressBar):
    """Lightning's rich progress bar with all its text in one line, which a narrow terminal cuts and does not wrap.

    It counts epochs from 1, and shows the learning rate and whatever is logged with ``prog_bar=True``. The bar itself
    takes the rest of the line.
    """

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        bars = [column for column in super().configure_columns(trainer) if isinstance(column, BarColumn)]
        for bar in bars:
            bar.bar_width = None
        self._line = _Line(self)
        self._line.epoch = _name_epoch(trainer)
        return [self._line, *bars]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_enabled:
            self._line.epoch = _name_epoch(trainer)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if self.is_enabled:  # here and not where it is drawn: that is another thread
            self._line.metrics = " ".join(_format_metrics(trainer, in_bar=True))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {}  # Lightning's own column of them would wrap


class _Line(ProgressColumn):
    def __init__(self, bar: RichProgressBar) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        descriptions = (bar.sanity_check_description, bar.validation_description)
        self._others = (*descriptions, bar.test_description, bar.predict_description)
        self.epoch = self.metrics = ""

    def render(self, task: Task) -> Text:
        trains = task.description not in self._others
        name = self.epoch if trains else task.description
        left = "-:--:--" if task.time_remaining is None else str(timedelta(seconds=int(task.time_remaining)))
        return Text(f"{name} {_count(task.completed, task.total)} -{left} {self.metrics if trains else ''}".rstrip())


class ProgressLines(ProgressBar):
    """A plain line of progress every so many seconds, for a standard output that is no terminal.

    The first line follows the first optimizer step, the last one ends the training. The time left follows from the mean
    of the steps that this process has taken.

    Args:
        every_seconds: The least time between two lines.
    """

    def __init__(self, every_seconds: float = 30.0) -> None:
        super().__init__()
        self._every, self._enabled = every_seconds, True
        self._began: tuple[float, int] | None = None  # when the first batch of this process began, and at which step
        self._printed_at = time.monotonic()
        self._printed_step, self._epoch = 0, ""

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)  # which disables all ranks but the first
        self._began, self._printed_at = None, time.monotonic()

    # A step is printed at the start of what follows it, when all callbacks have logged it.
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._began is None:
            self._began = time.monotonic(), trainer.global_step
            self._printed_step = trainer.global_step
        self._print_step_if_due(trainer)
        self._epoch = _name_epoch(trainer)  # at the end of a run Lightning has counted one more

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_step_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_step(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._print_batch("validating", "total_val_batches_current_dataloader", *args)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._print_batch("testing", "total_test_batches_current_dataloader", *args)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._print_batch("predicting", "total_predict_batches_current_dataloader", *args)

    def _is_due(self) -> bool:
        return time.monotonic() - self._printed_at >= self._every

    def _print(self, *parts: str) -> None:
        if self._enabled:
            try:
                print(", ".join(parts), flush=True)
            except OSError:  # who read the pipe has gone: no reason to end a run
                drop_lost_output()
        self._printed_at = time.monotonic()

    def _print_batch(
        self, name: str, total: str, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)  # sets the current loader
        if self._is_due():
            self._print(f"{name} {_count(batch_idx + 1, getattr(self, total))}")

    def _print_step_if_due(self, trainer: Trainer) -> None:
        first = self._began is not None and self._printed_step == self._began[1]
        if first or self._is_due():
            self._print_step(trainer)

    def _print_step(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if self._began is None or step == self._printed_step:
            return
        self._printed_step, total = step, planned_steps(trainer)
        parts = [f"step {_count(step, total)}", self._epoch.lower(), *_format_metrics(trainer, in_bar=False)]
        if total is not None:
            mean = (time.monotonic() - self._began[0]) / (step - self._began[1])
            parts.append(f"{timedelta(seconds=round(mean * max(0, total - step)))} left")
        self._print(*parts)


def _name_epoch(trainer: Trainer) -> str:
    """Name the epoch that trains, counted from 1."""
    number, last = trainer.current_epoch + 1, trainer.max_epochs
    return f"Epoch {number}/{last}" if last is not None and last > 0 else f"Epoch {number}"


def _count(done: float, total: float | None) -> str:
    return f"{done:.0f}" if total is None or total == float("inf") else f"{done:.0f}/{total:.0f}"


def _format_metrics(trainer: Trainer, in_bar: bool) -> list[str]:
    """Format what is logged for the progress bar, and the learning rate."""
    found = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
    if "learning_rate" in trainer.callback_metrics:
        found["learning_rate"] = float(trainer.callback_metrics["learning_rate"])
    names = [*(name for name in _FORMATS if name in found), *(name for name in found if name not in _FORMATS)]
    formats = {name: (f"{name} {{:.3f}}",) * 2 for name in names} | _FORMATS
    return [formats[name][0 if in_bar else 1].format(found[name]) for name in names]
