"""The progress bar of a run, narrow enough for a terminal of 80 columns."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich.progress import BarColumn
from typing_extensions import override

_BAR = 12  # characters: with it a line of numbers fits into 80

# metric: (its short name, its format)
_SHORT = {
    "train_loss": ("loss", ".3f"),
    "tokens_per_second": ("tok/s", ".0f"),
    "private_memory_gib": ("GiB", ".2f"),
    "memory_peak_gib": ("GiB", ".2f"),
}


class ShortProgressBar(RichProgressBar):
    """Lightning's rich progress bar with short names: loss, val_loss, tok/s and GiB (private, on CUDA the peak)."""

    @override
    def configure_columns(self, trainer: Trainer) -> list[Any]:
        # steps per second go: tokens per second say it better
        columns = [
            column for column in super().configure_columns(trainer) if not isinstance(column, ProcessingSpeedColumn)
        ]
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = _BAR
        return columns

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # a logger's version, which the run folder's name says
        return dict(_shorten(name, value) for name, value in metrics.items())


def _shorten(name: str, value: Any) -> tuple[str, Any]:
    short, style = _SHORT.get(name, (name, ".3f"))
    return short, format(value, style) if isinstance(value, float) else value
