"""The rows of a source, in order, each with its place."""

import csv
import hashlib
import io
import itertools
import json
import lzma
import reprlib
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from qlora_lightning.data.rows.bad_rows import BadRow, RowFault, kind_of
from qlora_lightning.data.rows.sources import DataFile, Source, kind_of_file
from qlora_lightning.support.errors import UserError


class Row(NamedTuple):
    """One dict of a data file.

    Attributes:
        values: the row's own keys and values.
        file: the file, as the user wrote it or below the folder he wrote; for a data set of the hub its id.
        line: the line on which the row begins, counted from 1; in a JSON array, in parquet
            and arrow files and on the hub the number of the row.
    """

    values: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        """File and line, as every message about this row begins: ``train.jsonl:17``."""
        return f"{self.file}:{self.line}"


def read_rows(source: Source) -> Iterator[Row | BadRow]:
    """Yield the rows of a source, and in their places those that are none.

    Memory grows with none but JSON arrays, which are read as a whole.

    Raises:
        UserError: a file cannot be read or is damaged, or the source holds no rows at all.
    """
    rows = itertools.islice(_read_files(source), source.rows)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source.path} is empty: it holds no rows.")
    yield first
    yield from rows


def _read_files(source: Source) -> Iterator[Row | BadRow]:
    for file in source.files or (None,):
        name = source.path if file is None else str(file)
        for line, values in _parse(source, file):
            yield BadRow(f"{name}:{line}", str(values)) if isinstance(values, RowFault) else Row(values, name, line)


def _parse(source: Source, file: DataFile | None) -> Iterator["Parsed"]:
    """Return the rows of a file, or of a data set of the hub."""
    if file is None:
        return _number_rows(_read_hub(source))
    kind, _ = kind_of_file(file)
    if kind in (".parquet", ".arrow"):
        return _read_table(file)
    if kind in (".csv", ".tsv"):
        return _read_csv(file, source.encoding, source.delimiter or ("\t" if kind == ".tsv" else ","))
    return _read_json(file, source.encoding)


def hash_source(source: Source) -> str:
    """Return a hash of what a source's rows are: bytes and kinds of its local files in order, and how they are read.

    Names do not count. Of a data set of the hub it is a hash of what ``datasets`` knows its content by.
    """
    total = hashlib.blake2b(repr((source.rows, source.encoding, source.delimiter)).encode(), digest_size=20)
    if not source.files:
        with _hub_errors(source):
            from datasets import load_dataset_builder as load

            builder = load(source.path, source.name, data_files=source.data_files, revision=source.revision)
        total.update(f"{builder.hash} {builder.config_id} {source.split}".encode())
    for file in source.files:
        with Path(file).open("rb") as stream:
            digest = hashlib.file_digest(stream, "blake2b").hexdigest()
        total.update(f"{kind_of_file(file)} {digest}\n".encode())
    return total.hexdigest()


# Files

Parsed = tuple[int, dict[str, Any] | RowFault]
"""A row's line or number, and its values, or why it is none."""

_CODECS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}
_NOT_UTF8 = "not UTF-8 text: save the file as UTF-8, or name its encoding, as in `encoding: latin-1`"


@contextmanager
def _open(file: DataFile) -> Iterator[Any]:
    """Open a file, local or behind a URL, for reading bytes; what cannot be read is a UserError, also later on."""
    import fsspec  # a fifth of a second, as pyarrow takes

    compression = kind_of_file(file)[1]
    try:
        with fsspec.open(str(file), "rb", compression=_CODECS.get(compression)) as stream:
            if compression == ".zst":  # which fsspec knows with Python 3.14 only
                import pyarrow

                stream = io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"))
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error


@contextmanager
def _open_text(file: DataFile, encoding: str, newline: str) -> Iterator[TextIO]:
    """Open a file for reading text; bytes that cannot be decoded are the fault of their row alone."""
    try:
        with _open(file) as stream, io.TextIOWrapper(stream, encoding, "surrogateescape", newline) as text:
            yield text
    except UnicodeError as error:  # of encodings in which the rest cannot be told either
        raise UserError(f"{file} cannot be read: {error}. Name its encoding, as in `encoding: latin-1`.") from error


MAX_LINE = 64_000_000  # characters: a few MB of a compressed file may be one line of many GB
MAX_WHOLE = 1_000_000_000  # characters of a JSON array, which is read as a whole


def _lines(stream: TextIO) -> Iterator[str]:
    """Yield lines; of one of more than :data:`MAX_LINE` the beginning, which :func:`_check_line` rejects."""
    while line := stream.readline(MAX_LINE + 1):
        yield line
        while len(line) > MAX_LINE and not line.endswith(("\n", "\r")):
            line = stream.readline(MAX_LINE + 1)  # the rest, a part of it at a time


def _check_line(line: str) -> str:
    if len(line) > MAX_LINE:
        raise _too_long("line")
    return line


def _too_long(what: str) -> RowFault:
    return RowFault(f"a {what} of more than {MAX_LINE // 1_000_000} MB, the most that is read")


def _check_decoded(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowFault(_NOT_UTF8) from None


# JSON


def _read_json(file: DataFile, encoding: str) -> Iterator[Parsed]:
    """Yield the rows of a JSON file: one object per line, or the elements of one array. Blank lines are skipped."""
    is_first = True
    with _open_text(file, encoding, newline="\n") as stream:
        for number, line in enumerate(_lines(stream), start=1):
            # Windows editors write the mark at the beginning of a file, and files are put end to end.
            line = line.removeprefix("\ufeff")
            text = line.strip(" \t\r\n")
            if is_first and text.startswith("["):
                most = MAX_LINE if kind_of_file(file)[1] else MAX_WHOLE  # parsed into several times as much memory
                for place, element in enumerate(_parse_array(file, line + stream.read(most), most), start=1):
                    yield place, _check_object(element)
                return
            if text:
                values: dict[str, Any] | RowFault
                try:
                    values = _check_object(_parse_json(_check_line(text)))
                except RowFault as fault:
                    values = fault
                if is_first:
                    _refuse_table(file, text, values)
                is_first = False
                yield number, values


def _refuse_table(file: DataFile, first: str, values: dict[str, Any] | RowFault) -> None:
    """Refuse a file by its first line: objects over several lines, or a table, ``{column: {row number: value}}``."""
    is_table = isinstance(values, dict) and values and all(map(_is_column, values.values()))
    if is_table or (first[0] == "{" and first[-1] in "{[,"):
        raise UserError(
            f"{file}: expected one JSON object per line or an array of objects, found a table or an object over "
            "several lines; write a DataFrame by df.to_json('rows.jsonl', orient='records', lines=True)."
        )


def _is_column(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(str.isdigit, value))


def _parse_array(file: DataFile, text: str, most: int) -> list[Any]:
    if len(text) > most:
        size = f"{most // 1_000_000:,} MB{' in a compressed file' if most == MAX_LINE else ''}"
        raise UserError(f"{file} is a JSON array of more than {size}: convert it to .jsonl, one object per line.")
    try:
        return _parse_json(text)  # type: ignore[no-any-return]
    except RowFault as fault:
        raise UserError(f"{file} is not a JSON array: {fault}.") from fault


def _parse_json(text: str) -> Any:
    _check_decoded(text)
    try:
        return json.loads(text, object_pairs_hook=_make_object)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested a thousand deep
        raise RowFault(f"not JSON: {error}") from error


def _check_object(values: Any) -> dict[str, Any] | RowFault:
    return values if isinstance(values, dict) else RowFault(f"{kind_of(values)}, expected a JSON object")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is twice in an object, of which Python keeps the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"the key {reprlib.repr(twice)} is twice in one object, where the last would count: keep one")
    return values


# CSV


def _read_csv(file: DataFile, encoding: str, delimiter: str) -> Iterator[Parsed]:
    """Yield the rows of a CSV file, each with its first line; all values are strings."""
    # The module's limit on a field, 128 KiB, is one for the whole process: it is raised here, never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    with _open_text(file, encoding, newline="") as stream:
        begin = 1
        try:
            lines = map(_check_line, _lines(stream))
            first = next(lines, "").removeprefix("\ufeff")
            _check_decoded(first)
            rows: Any = csv.DictReader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
            names = rows.fieldnames or []
            if len(set(names)) < len(names) or "" in map(str.strip, names[1:]):
                raise UserError(f"the header names a column twice, or one has no name: {', '.join(names)}")
            begin = rows.line_num + 1
            for values in rows:
                yield begin, _check_fields(values)
                begin = rows.line_num + 1
        except (csv.Error, UserError) as error:
            said = str(error).replace("unexpected end of data", "a quote that opens in this row is never closed")
            raise UserError(f"{file}:{begin}: {said}.") from error


def _check_fields(values: dict[Any, Any]) -> dict[str, Any] | RowFault:
    # what csv makes of a field without a column, and of a column without a field
    if None in values or None in values.values():
        names = ", ".join(name for name in values if name is not None)
        return RowFault(f"more or fewer fields than the header ({names}): quote a delimiter inside a field")
    try:
        _check_decoded("".join(values.values()))
    except RowFault as fault:
        return fault
    values.pop("", None)  # the index that pandas' to_csv() writes is the first column
    return values


# Parquet, Arrow, and the hub

_BATCH_ROWS = 4  # the most that are unpacked together: a file of few KB may hold one value of many MB for each of them


def _read_table(file: DataFile) -> Iterator[Parsed]:
    """Yield the rows of a parquet or Arrow file."""
    from pyarrow import ArrowException, ipc
    from pyarrow.parquet import ParquetFile

    kind, compression = kind_of_file(file)
    if compression:
        raise UserError(f"{file}: a table is read from any place: decompress it, and name the file that comes out.")
    with _open(file) as table:
        try:
            batches: Iterable[Any]
            if kind == ".parquet":
                # By itself it reads row groups as a whole, which may be as large as the file.
                parquet = ParquetFile(table, buffer_size=1 << 20, pre_buffer=False)
                batches = parquet.iter_batches(_BATCH_ROWS, use_threads=False)  # of which few rows make no use
            elif table.read(6) == b"ARROW1":  # Arrow's file format, as Feather and polars write it
                reader = ipc.open_file(table)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:  # its stream format, which ``datasets`` writes
                table.seek(0)
                batches = ipc.open_stream(table)
            yield from _number_rows(batches)
        except ArrowException as error:
            raise UserError(f"{file} cannot be read as {kind}: {error}") from error


def _read_hub(source: Source) -> Iterator[Any]:
    """Yield the rows of a data set of the hub as Arrow tables, mapped into memory."""
    with _hub_errors(source):
        from datasets import load_dataset

        rows: Any = load_dataset(
            source.path,
            source.name,
            data_files=source.data_files,
            split=source.split,
            revision=source.revision,
        )
        yield from rows.with_format("arrow").iter(256)


@contextmanager
def _hub_errors(source: Source) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of ``datasets``, of the hub, and of their libraries for HTTP and files
        said = " ".join(str(error).split())
        raise UserError(f"data set {source.path} cannot be read from the Hugging Face hub: {said}") from error


def _number_rows(batches: Iterable[Any]) -> Iterator[Parsed]:
    """Yield the rows of Arrow batches or tables, by number."""
    number = 0
    for part in (batch.slice(at, _BATCH_ROWS) for batch in batches for at in range(0, len(batch), _BATCH_ROWS)):
        is_large = part.nbytes > MAX_LINE
        for values in part.to_pylist():
            number += 1
            if is_large and len(repr(values)) > MAX_LINE:
                yield number, _too_long("row")
            else:
                yield number, {key: _without_fill(value) for key, value in values.items()}


def _without_fill(value: Any) -> Any:
    """Drop the nulls inside a column: Arrow gives every struct the keys of all, those that a row lacks as null."""
    if isinstance(value, dict):
        return {key: _without_fill(inner) for key, inner in value.items() if inner is not None}
    return [_without_fill(inner) for inner in value] if isinstance(value, list) else value
