"""Writes ``metrics.csv`` into the run folder, and continues it when a run is resumed."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from qlora_lightning.callbacks.checkpoint_file import reporting_disk_faults
from qlora_lightning.support.files import METRICS, flush, write_whole


class MetricsLogger(Logger):
    """A line per logged step. Lightning's ``CSVLogger`` deletes the file when a run is resumed; this one keeps it.

    Args:
        folder: The run folder.

    Attributes:
        rows: How many lines the table has, without its head.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / METRICS
        self.rows = 0
        self._columns: list[str] = []  # none: the file has not been read yet

    @property
    def name(self) -> str:
        """Empty: the file is in the run folder itself."""
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
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write nothing: ``config.yaml`` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line; a new metric widens the table."""
        row = {"step": step, **metrics}
        with reporting_disk_faults(self.save_dir):
            if row.keys() <= set(self._columns):
                with self.file.open("a", newline="", encoding="utf-8") as handle:
                    csv.DictWriter(handle, self._columns, lineterminator="\n").writerow(row)
                self.rows += 1
            else:
                self._rewrite([*self._read(), row])

    @rank_zero_only
    def flush(self) -> None:
        """Wait until the disk has every line."""
        if self.file.exists():
            flush(self.file)

    @rank_zero_only
    def cut(self, rows: int, before_step: int = 0) -> None:
        """Remove the lines that a resumed run writes again.

        Args:
            rows: So many lines stay.
            before_step: Those behind them stay that belong to an earlier optimizer step than this.
        """
        with reporting_disk_faults(self.save_dir):
            table = self._read()
            if table:
                self._rewrite(table[:rows] + [row for row in table[rows:] if int(row["step"]) < before_step])

    def _read(self) -> list[dict[str, Any]]:
        """Return the lines that are there; half a line, as a kill leaves it, is none."""
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))

    def _rewrite(self, rows: Sequence[dict[str, Any]]) -> None:
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.file, text.getvalue())
        self.rows = len(rows)
