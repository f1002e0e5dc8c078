"""The rows of a source, in order, each with its place, from any position."""

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qlora_lightning.data.rows.bad_rows import BadRow, RowFault, kind_of, refuse
from qlora_lightning.data.rows.hub import BATCH_ROWS, describe_hub, read_hub
from qlora_lightning.data.rows.sources import DataFile, Source, find_sources
from qlora_lightning.data.rows.sources import kind_of as kind_of_file
from qlora_lightning.support.errors import UserError

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One dict of a data file.

    Attributes:
        values: the row's own keys and values.
        file: the file, as the user wrote it or below the folder he wrote; for a data set of the hub its id.
        line: the line on which the row begins, counted from 1; in a JSON array, in parquet and arrow files and on the
            hub the number of the row.
    """

    values: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        """File and line, as every message about this row begins: ``train.jsonl:17``."""
        return f"{self.file}:{self.line}"


@dataclass
class Cursor:
    """Where the next row begins; plain numbers, so that a checkpoint can hold them.

    Attributes:
        file: index in the source's files.
        offset: in a local file of UTF-8 lines of JSON, not compressed, the bytes that are before it; 0 in other files,
            whose first ``count`` rows are read again and passed over.
        line: beside an offset, its line, counted from 1.
        count: rows of this file read so far, bad ones included.
        total: rows of all files read so far.
    """

    file: int = 0
    offset: int = 0
    line: int = 1
    count: int = 0
    total: int = 0

    def next_file(self) -> None:
        """Go to the beginning of the next file."""
        self.file, self.offset, self.line, self.count = self.file + 1, 0, 1, 0


class RowReader:
    """Reads the rows of a source as a stream: memory grows with none but JSON arrays, which are read as a whole.

    Each loop over it goes on behind the row last read, so that it can be left and taken up again.

    Args:
        source: what to read.
        position: where to begin, as ``position()`` gave it.

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
        cursor, source = self._cursor, self.source
        parts = source.files or (None,)
        while cursor.file < len(parts) and cursor.total != source.rows:
            file = parts[cursor.file]
            name = source.path if file is None else str(file)
            for line, values, fault in self._parse(file):
                cursor.count += 1
                cursor.total += 1
                yield BadRow(f"{name}:{line}", fault) if values is None else Row(values, name, line)
                if cursor.total == source.rows:
                    return
            if not cursor.count:
                raise UserError(f"{name} holds no rows.")
            cursor.next_file()

    def position(self) -> dict[str, int]:
        """Return where the next row begins, in plain numbers."""
        return asdict(self._cursor)

    def _parse(self, file: DataFile | None) -> Iterator["Parsed"]:
        """Return the rows of a file behind those that were read."""
        source, cursor = self.source, self._cursor
        if file is None:
            return number_rows(read_hub(source, cursor.count), begin=cursor.count)
        kind, _ = kind_of_file(file)
        if kind in (".parquet", ".arrow"):
            return read_table(file, cursor.count)
        if kind in (".csv", ".tsv"):
            delimiter = source.delimiter or ("\t" if kind == ".tsv" else None)
            return itertools.islice(read_csv(file, source.encoding, delimiter), cursor.count, None)
        rows = read_json(file, source.encoding, cursor)
        return rows if cursor.offset else itertools.islice(rows, cursor.count, None)


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
    found = [row for source in find_sources(value, split) for row in RowReader(source)]
    faults = [row for row in found if isinstance(row, BadRow)]
    if bad is None:
        refuse(faults)
    else:
        bad.extend(faults)
    return [row for row in found if isinstance(row, Row)]


def fingerprint(source: Source) -> str:
    """Return a hash of what a source's rows are: the bytes and kinds of its files in order, and how they are read.

    Names do not count. Of a data set of the hub it is a hash of what ``datasets`` knows its content by.
    """
    total = hashlib.blake2b(repr((source.rows, source.encoding, source.delimiter)).encode(), digest_size=20)
    if not source.files:
        total.update(describe_hub(source).encode())
    for file in source.files:
        with _open_stored(file) as stream:
            digest = hashlib.file_digest(stream, "blake2b").hexdigest()
        total.update(f"{kind_of_file(file)} {digest}\n".encode())
    return total.hexdigest()


# Files


@contextmanager
def _open_stored(file: DataFile) -> Iterator[Any]:
    """Open a file, local or behind a URL, as it is stored."""
    try:
        if isinstance(file, Path):
            with file.open("rb") as stream:
                yield stream
        else:
            import fsspec  # a fifth of a second

            with fsspec.open(file, "rb") as stream:
                yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error


@contextmanager
def open_stream(file: DataFile) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed.

    Raises:
        UserError: here or while it is read: it cannot be read, is damaged, or is not in the encoding that was named.
    """
    try:
        with _open_stored(file) as stored, _DECOMPRESS[kind_of_file(file)[1]](stored) as stream:
            yield stream
    except UnicodeError as error:
        raise UserError(f"{file} cannot be read: {error}. Name its encoding, as in `{_ENCODING}`.") from error


def _open_zstd(stored: BinaryIO) -> io.BufferedReader:
    import pyarrow  # a fifth of a second, for the one compression that the standard library lacks before Python 3.14

    return io.BufferedReader(pyarrow.CompressedInputStream(stored, "zstd"))


_DECOMPRESS: dict[str, Callable[[Any], Any]] = {
    "": lambda stored: stored,
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig", "ascii")


_ENCODING = "encoding: latin-1"
_NOT_UTF8 = f"not UTF-8 text: save the file as UTF-8, or name its encoding, as in `{_ENCODING}`"

Parsed = tuple[int, dict[str, Any] | None, str]
"""A row's line or number, its values (None where it is no row), and then the reason."""


# JSON

MAX_ARRAY_BYTES = 1_000_000_000  # an array is parsed as a whole, into several times as much memory


def read_json(file: DataFile, encoding: str, cursor: Cursor) -> Iterator[Parsed]:
    """Yield the rows of a JSON file: one object per line, or the elements of one array. Blank lines are skipped.

    If lines can be counted in bytes, they are read from the cursor on, which moves with them.

    Raises:
        UserError: the file is an array that is not JSON or too large, or holds objects that are no rows.
    """
    counted = isinstance(file, Path) and not kind_of_file(file)[1] and _is_utf8(encoding)
    is_first = cursor.offset == 0
    with open_stream(file) as stream:
        if counted:
            stream.seek(cursor.offset)
        lines = iter(stream) if _is_utf8(encoding) else _recode(stream, encoding)
        for number, raw in enumerate(lines, start=cursor.line):
            # Windows editors write it at the beginning of a file, and files are laid end to end.
            text = raw.removeprefix(codecs.BOM_UTF8)
            if is_first and text.lstrip().startswith(b"["):
                cursor.offset, cursor.line = 0, 1
                yield from _read_array(file, itertools.chain([text], lines))
                return
            if counted:
                cursor.offset, cursor.line = cursor.offset + len(raw), number + 1
            if not text.strip():
                continue
            values, fault = _parse_line(text)
            if is_first:
                _refuse_table(file, text, values)
            is_first = False
            yield number, values, fault


def _recode(stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    with io.TextIOWrapper(stream, encoding, newline="\n") as text:
        for line in text:
            yield line.encode()


def _parse_line(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return the object and no fault, or None and what is wrong."""
    try:
        # Not json.loads(raw): it lets surrogates pass, which no tokenizer takes.
        values = json.loads(raw.rstrip(b"\r\n").decode(), object_pairs_hook=_make_object)
    except UnicodeDecodeError:
        return None, _NOT_UTF8
    except RowFault as fault:
        return None, str(fault)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested a thousand deep
        return None, f"not JSON: {error}"
    return (values, "") if isinstance(values, dict) else (None, f"{kind_of(values)}, expected a JSON object")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is twice in an object, of which Python keeps the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise RowFault(f"has the key {reprlib.repr(twice)} twice in one object, where the last would count: keep one")
    return values


def _refuse_table(file: DataFile, first_line: bytes, values: dict[str, Any] | None) -> None:
    """Refuse objects that run over several lines, and a table as one object, by the first line."""
    is_table = values and all(isinstance(value, dict) and "0" in value for value in values.values())  # of to_json()
    if is_table or first_line.strip() == b"{":
        raise UserError(
            f"{file}: expected one JSON object per line, or an array of objects, found a table or an object over "
            "several lines. Write a DataFrame by df.to_json('rows.jsonl', orient='records', lines=True)."
        )


def _read_array(file: DataFile, lines: Iterable[bytes]) -> Iterator[Parsed]:
    """Yield the elements of an array, by number."""
    parts, size = [], 0
    for part in lines:
        parts.append(part)
        size += len(part)
        if size > MAX_ARRAY_BYTES:
            raise UserError(
                f"{file} is a JSON array of more than {MAX_ARRAY_BYTES / 1e9:g} GB, which would be parsed as a whole: "
                "convert it to .jsonl, one object per line."
            )
    try:
        elements = json.loads(b"".join(parts).decode(), object_pairs_hook=_make_object)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is {_NOT_UTF8}.") from error
    except RowFault as fault:
        raise UserError(f"{file}: an element {fault}.") from fault
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a JSON array: {error}.") from error
    for number, values in enumerate(elements, start=1):
        is_object = isinstance(values, dict)
        yield number, values if is_object else None, "" if is_object else f"{kind_of(values)}, expected a JSON object"


# CSV

_LARGEST_FIELD = 1 << 30
_DELIMITERS = ",;\t|"


def read_csv(file: DataFile, encoding: str, delimiter: str | None) -> Iterator[Parsed]:
    """Yield the rows of a CSV file, each with its first line; all values are strings.

    Args:
        file: the file.
        encoding: of its text.
        delimiter: between fields; None: the one that divides the header into most names.

    Raises:
        UserError: the header is no list of different names, or a quote is never closed.
    """
    # The module's limit on a field, 128 KiB, is one for the whole process: it is raised here, never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))
    # What cannot be decoded is the fault of its row alone; it stays, so that its commas and quotes are seen.
    encoding = "utf-8-sig" if _is_utf8(encoding) else encoding
    with open_stream(file) as stream, io.TextIOWrapper(stream, encoding, "surrogateescape", newline="") as text:
        first = text.readline()
        delimiter = delimiter or max(_DELIMITERS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
        records = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
        header: list[str] = []
        has_index, line = False, 1
        try:
            for fields in records:
                begin, line = line, records.line_num + 1
                if len(fields) < 2 and not "".join(fields).strip():
                    continue
                if not header:
                    header = fields
                    has_index = len(header) > 1 and header[0] in ("", "Unnamed: 0")
                    _check_header(file, begin, header[has_index:])
                    if has_index:
                        _log.info("%s: its first column, the index that pandas' to_csv() writes, is left out.", file)
                    continue
                fault = _find_fault(fields, header)
                if has_index and not fault and not fields[0].strip().isdecimal():
                    raise UserError(f"{file}:{begin}: column 1 has no name in the header: name it, or remove it.")
                yield begin, None if fault else dict(zip(header[has_index:], fields[has_index:], strict=True)), fault
        except csv.Error as error:
            reason = str(error).replace("unexpected end of data", "a quote that opens in this row is never closed")
            raise UserError(f"{file}:{line}: not CSV: {reason} (write a quote inside a field twice).") from error
        if not header:
            raise UserError(f"{file}: expected a header, found no text.")


def _check_header(file: DataFile, line: int, header: list[str]) -> None:
    fault = _find_fault(header, header)
    for number, name in enumerate(header, start=1):
        if not name.strip():
            fault = fault or f"column {number} has no name in the header: name it, or remove the column"
        if name in header[: number - 1]:
            fault = fault or f"the header names {name!r} twice: rename one column"
    if fault:
        raise UserError(f"{file}:{line}: {fault}.")


def _find_fault(fields: list[str], header: list[str]) -> str:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:  # bytes that could not be decoded
        return _NOT_UTF8
    if len(fields) == len(header):
        return ""
    return f"{len(fields)} fields, expected {len(header)} ({', '.join(header)}): quote a delimiter inside a field"


# Parquet, Arrow, and the hub

_BUFFER_BYTES = 1 << 20


def read_table(file: DataFile, skip: int) -> Iterator[Parsed]:
    """Yield the rows of a parquet or Arrow file behind the first ``skip``.

    Raises:
        UserError: the file cannot be read.
    """
    from pyarrow import ArrowException

    kind, compression = kind_of_file(file)
    with open_stream(file) as stream:
        try:
            table = io.BytesIO(stream.read()) if compression else stream  # both are read from any place
            batches = _read_parquet(table) if kind == ".parquet" else _read_arrow(table)
            yield from number_rows(batches, skip)
        except (ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UserError(f"{file} cannot be read as {kind}: {reason}. Write or download it again.") from error


def _read_parquet(stream: BinaryIO) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    # By itself it reads row groups as a whole, which may be as large as the file.
    return iter(ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False).iter_batches(BATCH_ROWS))


def _read_arrow(stream: BinaryIO) -> Iterator[Any]:
    """Yield the batches of Arrow's stream format, which ``datasets`` writes, or of its file format (Feather)."""
    from pyarrow import ipc

    magic = stream.read(6)
    stream.seek(0)
    if magic != b"ARROW1":
        return iter(ipc.open_stream(stream))
    reader = ipc.open_file(stream)
    return (reader.get_batch(number) for number in range(reader.num_record_batches))


def number_rows(batches: Iterable[Any], skip: int = 0, begin: int = 0) -> Iterator[Parsed]:
    """Yield the rows of Arrow batches or tables behind the first ``skip``, by number; ``begin`` come before them."""
    number = begin
    for batch in batches:
        for at in range(0, len(batch), BATCH_ROWS):
            part = batch.slice(at, BATCH_ROWS)
            passed = min(max(skip - number, 0), len(part))
            number += passed
            for values in part.slice(passed).to_pylist():
                number += 1
                yield number, {key: _without_fill(value) for key, value in values.items()}, ""


def _without_fill(value: Any) -> Any:
    """Drop the nulls inside a column: Arrow gives every struct the keys of all, those that a row lacks as null."""
    if isinstance(value, dict):
        return {key: _without_fill(inner) for key, inner in value.items() if inner is not None}
    return [_without_fill(inner) for inner in value] if isinstance(value, list) else value
