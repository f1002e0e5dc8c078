"""Parquet, batch by batch; the line of a row is its number."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qlora_lightning.data.reading.compression import kind_of, open_stream
from qlora_lightning.data.reading.cursor import Cursor, Parsed
from qlora_lightning.support.errors import UserError

BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20


def read_parquet(file: Path, cursor: Cursor) -> Iterator[Parsed]:
    """Yield the rows of a ``.parquet`` file from the cursor on, and move it.

    Raises:
        UserError: the file cannot be read.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with _open(file) as stream:
        try:
            # By itself it reads row groups as a whole, which may be as large as the file.
            table = ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            first, skipped = 0, cursor.count
            while first < len(sizes) and skipped >= sizes[first]:
                skipped -= sizes[first]
                first += 1
            batches = table.iter_batches(BATCH_ROWS, row_groups=list(range(first, len(sizes))))
            yield from number_rows(_drop(batches, skipped), cursor)
        except (ArrowException, OSError) as error:
            row = f" from row {cursor.count + 1} on" if cursor.count else ""
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UserError(f"{file} cannot be read as parquet{row}: {reason}. Write or download it again.") from error


def number_rows(batches: Iterable[Any], cursor: Cursor) -> Iterator[Parsed]:
    """Yield the rows of Arrow batches or tables, the next one of which the cursor counts, and move it."""
    for batch in batches:
        for values in batch.to_pylist():
            cursor.count += 1
            cursor.line = cursor.count + 1
            yield cursor.count, {key: _without_fill(value) for key, value in values.items()}, ""


def _without_fill(value: Any) -> Any:
    """Drop the nulls inside a column: Arrow gives every struct the keys of all, those that a row lacks as null."""
    if isinstance(value, dict):
        return {key: _without_fill(inner) for key, inner in value.items() if inner is not None}
    return [_without_fill(inner) for inner in value] if isinstance(value, list) else value


def _drop(batches: Iterable[Any], rows: int) -> Iterator[Any]:
    """Leave out the first rows."""
    for batch in batches:
        dropped = min(rows, len(batch))
        rows -= dropped
        yield batch.slice(dropped)


@contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    """Open the file to be read at any place; a compressed one is unpacked into a temporary file."""
    if not kind_of(file)[1]:
        with open_stream(file) as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as unpacked:
        with open_stream(file) as stream:
            shutil.copyfileobj(stream, unpacked)
        unpacked.seek(0)
        yield unpacked
