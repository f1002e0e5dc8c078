"""The rows of a source, in order, each with the line it is on, from any position."""

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import reprlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qlora_lightning.data.rows.bad_rows import BadRow, refuse
from qlora_lightning.data.rows.hub import BATCH_ROWS, describe_hub, read_hub
from qlora_lightning.data.rows.sources import Source, find_sources, kind_of
from qlora_lightning.support.errors import UserError

# No instruction is that long: two rows have run together, or a quote was never closed.
MAX_ROW_BYTES = 4 << 20

# What follows a broken bracket or quote cannot be told from what stands inside it.
REST_UNREAD = "the rest of the file cannot be read"

Parsed = tuple[int, dict[str, Any] | None, str]
"""A row's line, its values (None where it is no row), and then the reason."""


@dataclass
class Cursor:
    """Where the next row begins; plain numbers, so that a checkpoint can hold them.

    Attributes:
        file: index in the source's files.
        offset: bytes of the file, decompressed, that lie before it; -1 if nothing more can be read of this file.
        line: its line, counted from 1.
        count: rows of this file read so far, bad ones included.
    """

    file: int = 0
    offset: int = 0
    line: int = 1
    count: int = 0

    def end_file(self) -> None:
        """Give up the rest of the file."""
        self.offset = -1

    def next_file(self) -> None:
        """Go to the beginning of the next file."""
        self.file, self.offset, self.line, self.count = self.file + 1, 0, 1, 0


_CHUNK_BYTES = 1 << 20


def _open_zstd(file: Path) -> io.BufferedReader:
    import pyarrow  # a fifth of a second, for the one compression that the standard library lacks before Python 3.14

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}


@contextmanager
def open_stream(file: Path, offset: int = 0) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed, from a byte on (counted after decompression).

    Raises:
        UserError: here or while it is read: it cannot be read, is damaged, or ends before the offset.
    """
    _, compression = kind_of(file)
    try:
        with _OPENERS[compression](file) if compression else file.open("rb") as stream:
            _skip(stream, offset, file, compression)
            yield stream
    except EOFError as error:
        raise UserError(f"{file} is cut off in the middle: compress or download it again.") from error
    except (OSError, zlib.error, lzma.LZMAError) as error:
        # Errors of the system have a number; those of decompressing have none.
        if not compression or getattr(error, "errno", None):
            raise UserError(f"{file} cannot be read: {error}.") from error
        message = f"{file} is damaged, or not a {compression} file ({error}): compress or download it again."
        raise UserError(message) from error


def _skip(stream: BinaryIO, offset: int, file: Path, compression: str) -> None:
    if not compression:
        size = file.stat().st_size
        left = max(offset - size, 0)
        stream.seek(offset)
    else:
        left = offset
        while left and (chunk := stream.read(min(left, _CHUNK_BYTES))):
            left -= len(chunk)
    if left:
        raise UserError(f"{file} ends before byte {offset}, where reading is to go on: it was changed since.")


NOT_UTF8 = "not UTF-8 text: save the file as UTF-8"
TOO_LONG = f"longer than {MAX_ROW_BYTES >> 20} MiB: two rows have probably run together"
_PIECE_BYTES = 1 << 16


class RowDecoder(json.JSONDecoder):
    """Decodes JSON, and remembers a key that stands twice in an object, of which Python keeps the last.

    Attributes:
        fault: what is wrong with what was decoded last; empty where no key stands twice.
    """

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._make_object)
        self.fault = ""

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """Decode the value that begins at ``idx``, and give its end."""
        self.fault = ""
        return super().raw_decode(s, idx)

    def _make_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs) and not self.fault:
            keys = [key for key, _ in pairs]
            twice = next(key for key in values if keys.count(key) > 1)
            self.fault = f"has the key {reprlib.repr(twice)} twice in one object, where the last would count: keep one"
        return values


_DECODER = RowDecoder()


def read_lines(file: Path, cursor: Cursor) -> Iterator[Parsed]:
    """Yield the rows of a ``.jsonl`` file from the cursor on, and move it; blank lines are skipped."""
    with open_stream(file, cursor.offset) as stream:
        while raw := stream.readline(MAX_ROW_BYTES + 1):
            too_long = len(raw) > MAX_ROW_BYTES
            cursor.offset += len(raw) + (_pass_line(stream, raw) if too_long else 0)
            line, cursor.line = cursor.line, cursor.line + 1
            # Windows editors write it at the beginning of a file, and files are laid end to end.
            raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.isspace() or not raw:
                continue
            cursor.count += 1
            yield line, *((None, TOO_LONG) if too_long else _parse_line(raw))


def _pass_line(stream: BinaryIO, raw: bytes) -> int:
    """Read to the end of the line of which ``raw`` is the beginning, and return the bytes passed over."""
    passed = 0
    while raw and not raw.endswith(b"\n"):
        raw = stream.readline(_PIECE_BYTES)
        passed += len(raw)
    return passed


def _parse_line(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return the object and no fault, or None and what is wrong."""
    try:
        # Not json.loads(raw): it lets surrogates pass, which no tokenizer takes.
        text = raw.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        cut = error.reason == "unexpected end of data" and not raw.endswith(b"\n")
        return None, "the line ends in the middle of a character" if cut else NOT_UTF8
    try:
        values = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return None, _describe_error(error, text)
    if not isinstance(values, dict):
        return None, f"{kind_of_value(values)}, not a JSON object"
    return (None, _DECODER.fault) if _DECODER.fault else (values, "")


def _describe_error(error: ValueError | RecursionError, text: str) -> str:
    """Say why a line is not JSON, and where."""
    if not isinstance(error, json.JSONDecodeError):
        # A number of thousands of digits, brackets nested a thousand deep.
        return f"not JSON that can be read: {str(error).partition(';')[0]}"
    if "\0" in text:
        return f"not JSON: NUL byte (column {text.index(chr(0)) + 1})"
    if is_cut(error, text):
        return f"not JSON: the line ends in the middle of the row ({error.msg}, column {error.colno})"
    return f"not JSON: {error.msg} (column {error.colno})"


def is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Return whether more text could have mended the error: it stands at the end."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())


def kind_of_value(value: object) -> str:
    """Name the JSON kind of a value that is no object."""
    names = {str: "a string", list: "an array", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


_ARRAY_BYTES = 1 << 18
_SPACE = re.compile(r"[ \t\r\n]*")


def read_array(file: Path, cursor: Cursor) -> Iterator[Parsed]:
    """Yield the elements of the array in a ``.json`` file from the cursor on, and move it.

    The cursor stands right behind an element, before the comma. What follows a syntax error is not read.
    """
    with open_stream(file, cursor.offset) as stream:
        window = _Window(stream, cursor)
        if not cursor.offset:
            window.enter_array()
        try:
            while window.enter_element():
                line, value = cursor.line, window.read_value()
                cursor.count += 1
                reason = _DECODER.fault if isinstance(value, dict) else f"is {kind_of_value(value)}, not an object"
                if reason:
                    yield line, None, f"element {cursor.count - 1} of the array {reason}"
                else:
                    yield line, value, ""
        except _Fault as fault:
            cursor.count += 1
            cursor.end_file()
            yield fault.line, None, f"{fault}; {REST_UNREAD}"
        cursor.end_file()


class _Fault(Exception):
    """The array cannot be read any further."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


class _Window:
    """The part of the file's text in which the next element is looked for; ``at`` is where the cursor stands in it."""

    def __init__(self, stream: BinaryIO, cursor: Cursor) -> None:
        self.text, self.at = "", 0
        self._stream, self._cursor = stream, cursor
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._ended = self._broken = False  # no more text; and that because of bytes that are not UTF-8

    def enter_array(self) -> None:
        """Step over the opening bracket, which is there, and a byte order mark before it."""
        self._skip_space()
        if self.text.startswith("\ufeff"):
            self._move(self.at + 1)
            self._skip_space()
        self._move(self.at + 1)

    def enter_element(self) -> bool:
        """Step to the next element; False at the end of the array.

        Raises:
            _Fault: there is neither a comma nor the end.
        """
        mark = self._skip_space()
        if mark == "]":
            self._move(self.at + 1)
            if self._skip_space():
                raise self._fault("more text after the end of the array", self.at)
            return False
        if self._cursor.count:
            if mark != ",":
                reason = f"expected ',' or ']' after element {self._cursor.count - 1} of the array"
                raise self._fault(reason, self.at)
            self._move(self.at + 1)
            self._skip_space()
        return True

    def read_value(self) -> Any:
        """Parse the element and step over it.

        Raises:
            _Fault: it is not JSON, or too long.
        """
        while True:
            error, end = None, len(self.text)
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as raised:
                error = raised
            # 12 at the end of the text may be the beginning of 123 or 12.5.
            if error is None and end < len(self.text) and self.text[end] in ",] \t\r\n":
                break
            if not self._grow():
                break
        if error is not None:
            raise self._explain(error)
        self._move(end)
        return value

    def _explain(self, error: ValueError | RecursionError) -> _Fault:
        index, element = self._cursor.count, self.text[self.at :]
        if not isinstance(error, json.JSONDecodeError):
            return self._fault(f"element {index} of the array cannot be read: {str(error).partition(';')[0]}", self.at)
        if len(element) > MAX_ROW_BYTES and is_cut(error, self.text):
            return self._fault(f"element {index} of the array is {TOO_LONG}", self.at)
        if self._broken and is_cut(error, self.text):
            return self._fault("", len(self.text))
        place = f"{error.msg}, character {error.pos - self.at + 1} of it"
        cut = "the file ends in the middle: " if is_cut(error, self.text) else ""
        return self._fault(f"not JSON in element {index} of the array ({cut}{place})", error.pos)

    def _fault(self, reason: str, at: int) -> _Fault:
        line = self._cursor.line + self.text.count("\n", self.at, at)
        return _Fault(NOT_UTF8 if self._broken and at >= len(self.text) else reason, line)

    def _skip_space(self) -> str:
        """Step over white space and return the character behind it; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self._move(match.end() if match else self.at)
            if self.at < len(self.text) or not self._grow():
                return self.text[self.at : self.at + 1]

    def _move(self, at: int) -> None:
        passed = self.text[self.at : at]
        self._cursor.offset += len(passed.encode())
        self._cursor.line += passed.count("\n")
        self.at = at

    def _grow(self) -> bool:
        """Read on, as much again as is in hand; False at the end of the file, or with more than one row in hand."""
        kept = self.text[self.at :]
        size = min(max(_ARRAY_BYTES, len(kept)), MAX_ROW_BYTES + 1 - len(kept))
        if self._ended or size <= 0:
            return False
        raw = self._stream.read(size)
        self._ended = not raw
        try:
            more = self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            more, self._ended, self._broken = error.object[: error.start].decode(), True, True
        self.text, self.at = kept + more, 0
        return True


def read_json(file: Path, cursor: Cursor) -> Iterator[Parsed]:
    """Yield the rows of a ``.json`` file from the cursor on, and move it.

    Raises:
        UserError: the file holds one object that runs over several lines.
    """
    with open_stream(file) as stream:
        head = stream.read(MAX_ROW_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
        is_whole = not stream.read(1)
    if head.startswith(b"["):
        return read_array(file, cursor)
    if _is_one_long_object(head.decode(errors="replace"), is_whole):
        raise UserError(
            f"{file} holds one JSON object over several lines: expected an array of objects, or one object per line."
        )
    return read_lines(file, cursor)


def _is_one_long_object(head: str, is_whole: bool) -> bool:
    """Return whether a file begins with an object over several lines, by its first 4 MiB or by the whole of it."""
    if not head.startswith("{"):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(head)
    except json.JSONDecodeError as error:
        return not is_whole and "\n" in head and is_cut(error, head)
    except (ValueError, RecursionError):
        return False
    return "\n" in head[:end]


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
                if values is None:
                    yield BadRow(f"{name}:{line}", fault, ends_file=fault.endswith(REST_UNREAD))
                else:
                    yield Row(values, name, line)
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
            return number_rows(read_hub(self.source, self._cursor.count), self._cursor)
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
