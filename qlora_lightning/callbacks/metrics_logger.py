"""Writes ``metrics.csv``, and continues it on a resume."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from qlora_lightning.callbacks.checkpoint_file import reporting_disk_faults
from qlora_lightning.report.run_files import read_metric_rows
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import METRICS, set_aside, write_whole


class MetricsLogger(Logger):
    """Write a line per logged step into a run folder. Lightning's ``CSVLogger`` deletes the file on a resume."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / METRICS
        self._columns: list[str] = []  # empty: the file has not been read yet

    @property
    def name(self) -> str:
        return ""  # the file is in the run folder itself

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
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
            else:
                self._rewrite([*self._read(), row])

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Remove the lines from an optimizer step on, which a resumed run writes again."""
        with reporting_disk_faults(self.save_dir):
            rows = self._read()
            if rows:
                self._rewrite([row for row in rows if int(row["step"]) < step])

    def _read(self) -> Sequence[dict[str, Any]]:
        """Return the lines of the file; none if it cannot be read, and it is kept under another name."""
        try:
            return read_metric_rows(self.file)
        except UserError as fault:
            say(f"{fault} It is kept as {set_aside(self.file).name}.")
            return []

    def _rewrite(self, rows: Sequence[dict[str, Any]]) -> None:
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.file, text.getvalue())
