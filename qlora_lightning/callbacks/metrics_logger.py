"""Writes ``metrics.csv`` into the run folder, and goes on with it when a run is resumed."""

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsLogger(Logger):
    """A line per logged step. Lightning's ``CSVLogger`` deletes the file when a run goes on; this one keeps it.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """Empty: the file lies in the run folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty likewise."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.file.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write nothing: ``config.yaml`` says it all."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line; a new metric widens the table."""
        row = {"step": step, **metrics}
        if not self._columns and self.file.exists():
            self._columns = list(self._read()[0])
        new = [name for name in row if name not in self._columns]
        if new:
            _, rows = self._read()
            self._columns += new
            self._rewrite([*rows, row])
            return
        with self.file.open("a", newline="", encoding="utf-8") as handle:
            csv.DictWriter(handle, self._columns).writerow(row)

    @rank_zero_only
    def cut(self, step: int, keep_validation: bool = False) -> None:
        """Forget the lines that a resumed run writes again.

        Args:
            step: Lines before this optimizer step stay.
            keep_validation: Keep validations at this very step too: the run goes on inside its window, behind them.
        """
        if self.file.exists():
            self._columns, rows = self._read()
            self._rewrite(
                [row for row in rows if int(row["step"]) < step + bool(keep_validation and row.get("val_loss"))]
            )

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        if not self.file.exists():
            return [], []
        with self.file.open(newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            return list(reader.fieldnames or []), list(reader)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".unfinished")
        with unfinished.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(unfinished, self.file)
