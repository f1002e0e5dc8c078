"""Writes ``metrics.csv`` into the run folder, and continues it when a run is resumed."""

import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import flush, write_whole


class MetricsLogger(Logger):
    """A line per logged step. Lightning's ``CSVLogger`` deletes the file when a run is resumed; this one keeps it.

    Args:
        folder: The run folder.

    Attributes:
        rows: How many lines the table has, without its head.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"
        self.rows = 0
        self._columns: list[str] = []

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
        """Append one line; a new metric widens the table.

        Raises:
            UserError: The disk is full or fails.
        """
        row = {"step": step, **metrics}
        with self._reporting_faults():
            if not self._columns and self.file.exists():
                self._open()
            new = [name for name in row if name not in self._columns]
            if new:
                earlier = self._read()
                self._columns += new
                self._rewrite([*earlier, row])
            else:
                with self.file.open("a", newline="", encoding="utf-8") as handle:
                    handle.write(self._to_text([row]))
                self.rows += 1

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

        Raises:
            UserError: The file cannot be read or written.
        """
        with self._reporting_faults():
            if self.file.exists():
                self._open()
                table = self._read()
                kept = table[:rows] + [row for row in table[rows:] if int(row["step"]) < before_step]
                if kept != table:
                    self._rewrite(kept)

    @contextlib.contextmanager
    def _reporting_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.file} could not be read or written: {error.strerror or error}. What was saved is intact: "
                "resume from it with `--ckpt_path last` when that is mended."
            ) from error

    def _open(self) -> None:
        """Continue a table that is there; half a line, as a kill leaves it, goes."""
        whole, end, half = self.file.read_text(encoding="utf-8").rpartition("\n")
        if half:
            write_whole(self.file, whole + end)
        with self.file.open(newline="", encoding="utf-8") as handle:
            self._columns = next(csv.reader(handle), [])
        self.rows = len(self._read())

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        with self.file.open(newline="", encoding="utf-8") as handle:
            return list(csv.DictReader(handle))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, self._to_text(rows, head=True))
        self.rows = len(rows)

    def _to_text(self, rows: list[dict[str, Any]], head: bool = False) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if head:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
