"""The rows of a source, in order, each with the line it stands on, from any position."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from qlora_lightning.data.reading.bad_rows import BadRow, refuse
from qlora_lightning.data.reading.compression import kind_of
from qlora_lightning.data.reading.cursor import Cursor, Parsed
from qlora_lightning.data.reading.read_csv import read_csv
from qlora_lightning.data.reading.read_hub import describe_hub, read_hub
from qlora_lightning.data.reading.read_json import read_json
from qlora_lightning.data.reading.read_lines import read_lines
from qlora_lightning.data.reading.read_parquet import read_parquet
from qlora_lightning.data.reading.sources import Source, find_sources
from qlora_lightning.support.errors import UserError

_READERS: dict[str, Callable[[Path, Cursor], Iterator[Parsed]]] = {
    ".jsonl": read_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


class Row(NamedTuple):
    """One dict of a data file.

    Attributes:
        values: the row's own keys and values.
        file: the file, as the user wrote it or below the folder he wrote; for a data set of the hub its id.
        line: the line on which the row begins, counted from 1; in parquet and on the hub the number of the row.
    """

    values: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        """File and line, as every message about this row begins: ``train.jsonl:17``."""
        return f"{self.file}:{self.line}"


class RowReader:
    """Reads the rows of a source as a stream: memory does not grow with the files.

    Each loop over it goes on behind the row last read, so that it can be left and taken up again.

    Args:
        source: what to read.
        position: where to begin, as ``position()`` gave it; the rows before it are not parsed again.

    Example:
        >>> reader = RowReader(source)
        >>> first = next(iter(reader))
        >>> rest = list(RowReader(source, reader.position()))
    """

    def __init__(self, source: Source, position: Mapping[str, int] | None = None) -> None:
        self.source = source
        self._cursor = Cursor(**(position or {}))

    def __iter__(self) -> Iterator[Row | BadRow]:
        """Yield rows, and in their places those that are none.

        Raises:
            UserError: a file cannot be read, is damaged, or holds no rows at all.
        """
        cursor, parts = self._cursor, self.source.files or (None,)
        while cursor.file < len(parts):
            file = parts[cursor.file]
            name = self.source.path if file is None else str(file)
            for line, values, fault in self._parse(file):
                yield BadRow(f"{name}:{line}", fault) if values is None else Row(values, name, line)
            if not cursor.count:
                raise UserError(f"{name} holds no rows.")
            cursor.next_file()

    def position(self) -> dict[str, int]:
        """Return where the next row begins, in plain numbers."""
        return asdict(self._cursor)

    def _parse(self, file: Path | None) -> Iterator[Parsed]:
        if self._cursor.offset < 0:
            return iter(())
        if file is None:
            return read_hub(self.source, self._cursor)
        return _READERS[kind_of(file)[0]](file, self._cursor)


def read_rows(
    value: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
    bad: list[BadRow] | None = None,
    split: str = "train",
) -> list[Row]:
    """Read all rows at once, in order; blank lines are skipped, weights are not looked at.

    Args:
        value: a file, folder, glob or hub id, or a list: see ``find_sources``.
        bad: where rows that are none are collected; without it they are an error.
        split: as in ``find_sources``.

    Raises:
        UserError: as ``find_sources`` and ``RowReader`` do; or a row is none (and ``bad`` was not given).
    """
    rows: list[Row] = []
    faults: list[BadRow] = []
    for source in find_sources(value, split):
        for row in RowReader(source):
            rows.append(row) if isinstance(row, Row) else faults.append(row)
    if bad is None:
        refuse(faults)
    else:
        bad.extend(faults)
    return rows


def fingerprint(source: Source) -> str:
    """Return a hash of a source's content: the bytes and kinds of its files in order, not their names.

    Of a data set of the hub it is a hash of what ``datasets`` knows its content by, the split included.

    Raises:
        UserError: a file cannot be read, or the data set cannot be reached.
    """
    total = hashlib.blake2b(digest_size=20)
    if not source.files:
        total.update(describe_hub(source).encode())
    for file in source.files:
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "blake2b").hexdigest()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error}.") from error
        total.update(f"{kind_of(file)} {digest}\n".encode())
    return total.hexdigest()
