"""CSV: a header, then one row per record, which may run over several lines where a field is quoted."""

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qlora_lightning.data.reading.compression import open_stream
from qlora_lightning.data.reading.cursor import MAX_ROW_BYTES, REST_UNREAD, Cursor, Parsed
from qlora_lightning.data.reading.read_lines import NOT_UTF8, TOO_LONG
from qlora_lightning.support.errors import UserError

_PIECE_BYTES = 1 << 16


def read_csv(file: Path, cursor: Cursor) -> Iterator[Parsed]:
    """Yield the rows of a ``.csv`` file from the cursor on, and move it; all values are strings.

    Raises:
        UserError: the header is no list of different names, separated by commas.
    """
    start = Cursor()
    with open_stream(file) as stream:
        header = _read_header(file, stream, start)
    if not cursor.offset:
        cursor.offset, cursor.line = start.offset, start.line
    with open_stream(file, cursor.offset) as stream:
        for line, fields, fault in _read_records(stream, cursor):
            cursor.count += 1
            fault = fault or _compare(fields, header)
            yield line, (None if fault else dict(zip(header, fields, strict=True))), fault


def _read_header(file: Path, stream: BinaryIO, cursor: Cursor) -> list[str]:
    line, header, fault = next(_read_records(stream, cursor), (1, [], "expected a header, found no text"))
    if len(header) == 1 and (other := next((mark for mark in ";\t" if mark in header[0]), "")):
        fault = f"the header is separated by {other!r}: expected commas"
    for number, name in enumerate(header, start=1):
        if not name.strip():
            fault = fault or f"column {number} has no name in the header: name it, or remove the column"
        if name in header[: number - 1]:
            fault = fault or f"the header names {name!r} twice: rename one column"
    if fault:
        raise UserError(f"{file}:{line}: {fault}.")
    return header


def _compare(fields: list[str], header: list[str]) -> str:
    if len(fields) == len(header):
        return ""
    reason = f"{len(fields)} fields, expected {len(header)} ({', '.join(header)})"
    return f"{reason}: a comma inside a field needs quotes around it" if len(fields) > len(header) else reason


def _read_records(stream: BinaryIO, cursor: Cursor) -> Iterator[tuple[int, list[str], str]]:
    """Yield the first line, the fields and the fault of each record that is not blank."""
    # The module's limit on a field, 128 KiB, is one for the whole process: it is raised here, never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    lines = _Lines(stream, cursor)
    records = csv.reader(lines, strict=True)
    while True:
        line = cursor.line
        lines.begin_record()
        try:
            fields = next(records)
        except StopIteration:
            return
        except _TooLongError:
            lines.pass_record()
            yield line, [], TOO_LONG
        except csv.Error as error:
            open_quote = str(error) == "unexpected end of data"
            what = "a quote that opens in this row is never closed" if open_quote else str(error)
            cursor.end_file()
            yield line, [], f"not CSV: {what} (a quote inside a quoted field is written twice); {REST_UNREAD}"
            return
        else:
            if lines.fault or len(fields) > 1 or (fields and fields[0].strip()):
                yield line, fields, lines.fault


class _TooLongError(Exception):
    """A record is longer than a row may be."""


class _Lines:
    """The file's lines as text, for the csv module, which takes as many as the record in hand has."""

    def __init__(self, stream: BinaryIO, cursor: Cursor) -> None:
        self._stream, self._cursor = stream, cursor
        self.begin_record()

    def begin_record(self) -> None:
        """Count anew: the next line begins a record."""
        self.fault, self._bytes, self._quotes, self._line_ended = "", 0, 0, False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        raw = self._read(MAX_ROW_BYTES + 1 - self._bytes)
        if not raw:
            raise StopIteration
        if self._bytes > MAX_ROW_BYTES:
            raise _TooLongError
        if self._cursor.offset == len(raw):
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if b"\0" in raw:
            self.fault = "NUL bytes in the row: it is not text"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fault = NOT_UTF8
            return raw.decode(errors="replace")  # its commas and quotes still tell where the record ends

    def pass_record(self) -> None:
        """Go to the end of a record that is too long: the end of a line behind which no quote is open."""
        while not self._line_ended or self._quotes % 2:
            if not self._read(_PIECE_BYTES):
                return

    def _read(self, limit: int) -> bytes:
        raw = self._stream.readline(limit)
        self._line_ended = raw.endswith(b"\n")
        self._bytes += len(raw)
        self._quotes += raw.count(b'"')
        self._cursor.offset += len(raw)
        self._cursor.line += self._line_ended
        return raw
