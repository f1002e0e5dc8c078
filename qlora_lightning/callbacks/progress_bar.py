"""Progress of a run: a bar that fits into a terminal of 80 columns, or a line now and then in a log file."""

import sys
import time
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.table import Column

from qlora_lightning.support.console import terminal
from qlora_lightning.support.trainer import planned_steps
from qlora_lightning.support.versions import PEAK_NAMES

# the most important metric first, for a narrow terminal cuts the last ones
_FORMATS = {
    "train_loss": "loss {:.3f}",
    "val_loss": "val {:.3f}",
    "learning_rate": "lr {:.1e}",
    "tokens_per_second": "{:.0f} tok/s",
    **dict.fromkeys(PEAK_NAMES.values(), "{:.2f} GiB"),
}


def choose_progress_display() -> ProgressBar:
    """Return the bar if standard output is a terminal that can redraw a line, else the lines."""
    return ShortProgressBar() if sys.stdout.isatty() and terminal().is_interactive else ProgressLines()


class ShortProgressBar(RichProgressBar):
    """Lightning's rich progress bar with all its text in one line, which a narrow terminal cuts and does not wrap.

    It counts epochs from 1, and shows the time left of the epoch, the learning rate and whatever is logged with
    ``prog_bar=True``. The bar itself takes the rest of the line.
    """

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        text = "{task.completed:.0f}/{task.total:.0f} {task.description}"
        return [TextColumn(text, table_column=Column(no_wrap=True, overflow="ellipsis")), BarColumn(bar_width=None)]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._describe(_name_epoch(trainer))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if self.is_enabled:
            left = self.train_progress_bar.time_remaining
            shown = "-:--:--" if left is None else timedelta(seconds=int(left))
            self._describe(f"{_name_epoch(trainer)} -{shown} {' '.join(_format_metrics(trainer))}")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {}  # Lightning's own column of them would wrap

    def _describe(self, text: str) -> None:
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=escape(text))


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

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)  # which disables all ranks but the first
        self._printed_at = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        self._first_step = self._printed_step = trainer.global_step

    # A step is printed at the start of what follows it, when all callbacks have logged it.
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._print_step_if_due(trainer)
        self._epoch = _name_epoch(trainer)  # at the end of a run Lightning has counted one more

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._print_step_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_step(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._print_batch("validating", "total_val_batches_current_dataloader", *args)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._print_batch("testing", "total_test_batches_current_dataloader", *args)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._print_batch("predicting", "total_predict_batches_current_dataloader", *args)

    def _print(self, line: str) -> None:
        if self._enabled:
            print(line, flush=True)
        self._printed_at = time.monotonic()

    def _is_due(self) -> bool:
        return time.monotonic() - self._printed_at >= self._every

    def _print_batch(
        self, name: str, total: str, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)  # sets the current loader
        if self._is_due():
            self._print(f"{name} {batch_idx + 1}/{getattr(self, total)}")

    def _print_step_if_due(self, trainer: Trainer) -> None:
        if self._is_due() or self._printed_step == self._first_step:
            self._print_step(trainer)

    def _print_step(self, trainer: Trainer) -> None:
        step, total = trainer.global_step, planned_steps(trainer)
        if step == self._printed_step:
            return
        self._printed_step = step
        count = f"step {step}" if total is None else f"step {step}/{total}"
        parts = [count, self._epoch.lower(), *_format_metrics(trainer)]
        if total is not None:
            mean = (time.monotonic() - self._began) / (step - self._first_step)
            parts.append(f"{timedelta(seconds=round(mean * max(0, total - step)))} left")
        self._print(", ".join(parts))


def _name_epoch(trainer: Trainer) -> str:
    """Name the epoch that trains, counted from 1."""
    number, last = trainer.current_epoch + 1, trainer.max_epochs
    return f"Epoch {number}/{last}" if last is not None and last > 0 else f"Epoch {number}"


def _format_metrics(trainer: Trainer) -> list[str]:
    """Format what is logged for the progress bar, and the learning rate."""
    found = dict(trainer.progress_bar_metrics)
    if "learning_rate" in trainer.callback_metrics:
        found["learning_rate"] = float(trainer.callback_metrics["learning_rate"])
    formats = _FORMATS | {name: f"{name} {{:.3f}}" for name in found if name not in _FORMATS}
    return [text.format(float(found[name])) for name, text in formats.items() if name in found]
