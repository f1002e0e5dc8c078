"""Read the rows of a source in order, each with its file and line or number.

JSON is read here, so that bad rows are reported by line and tool schemas stay as they are; CSV by pandas; parquet and
Arrow by pyarrow, a few rows at a time; data sets of the hub by ``datasets``.
"""

import codecs
import hashlib
import itertools
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import fsspec
import fsspec.core

from qlora_lightning.data.rows.bad_rows import MAX_TEXT, TOO_MUCH_TEXT, BadRow, RowFault, kind_of
from qlora_lightning.data.rows.sources import DataFile, Source, kind_of_file
from qlora_lightning.support.errors import UserError

_ROWS_AT_A_TIME = 4  # a page of a few kB may unpack to many rows of many MB
_ADVICE = "name its encoding, as in `encoding: cp1252` (what Excel writes in Western Europe)"
# encodings of files that begin with a byte order mark
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8"}


class Row(NamedTuple):
    """One dict of a data file.

    Attributes:
        values: the row's own keys and values.
        file: the path as the user wrote it, or below that folder; for a data set of the hub its id.
        line: the line in JSON lines, else the number of the row, from 1.
        source: the source that it was read from, which says how it is read; None: as ``data:`` says.
    """

    values: dict[str, Any]
    file: str
    line: int
    source: Source | None = None

    @property
    def where(self) -> str:
        """File and line, with which messages about this row begin: ``train.jsonl:17``."""
        return f"{self.file}:{self.line}"


def read_rows(source: Source) -> Iterator[Row | BadRow]:
    """Yield the rows of a source, also those that cannot be read, in order.

    Raises:
        UserError: a file cannot be read or is damaged, or the source has no rows.
    """
    rows = itertools.islice(_read_files(source), source.rows)
    first_row = next(rows, None)
    if first_row is None:
        raise UserError(f"{source.path} is empty: it holds no rows.")
    yield first_row
    yield from rows


def hash_source(source: Source) -> str:
    """Return a hash of the bytes of a source's local files, or of the identity of a hub data set in ``datasets``."""
    digest = hashlib.blake2b(digest_size=20)
    if not source.files:
        with _naming(f"data set {source.path}"):
            from datasets import load_dataset_builder as load

            builder = load(source.path, source.name, data_files=source.data_files, revision=source.revision)
        digest.update(f"{builder.hash} {builder.config_id}".encode())
    for file in source.files:
        with Path(file).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def _read_files(source: Source) -> Iterator[Row | BadRow]:
    for file in source.files or (None,):
        name = source.path if file is None else str(file)
        with _naming(name if file else f"data set {name}"):
            for number, values in _read_file(source, file):
                if isinstance(values, RowFault):
                    yield BadRow(f"{name}:{number}", str(values), source)
                else:
                    yield Row(values, name, number, source)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Raise errors of fsspec, pandas, pyarrow, ``datasets`` and the hub as a UserError that names the file."""
    try:
        yield
    except Exception as error:
        advice = f": {_ADVICE}" if isinstance(error, UnicodeError) else ""
        raise UserError(f"{name} cannot be read: {' '.join(str(error).split())}{advice}.") from error


def _open(file: str, mode: str, **options: str) -> fsspec.core.OpenFile:
    """Open a file, decompressed. In the name of a local one ``::`` chains no file systems, and ``~`` is no home."""
    if "://" in file:
        return fsspec.open(file, mode, compression="infer", **options)
    compression = fsspec.core.get_compression(file, "infer")
    return fsspec.core.OpenFile(fsspec.filesystem("file"), os.path.abspath(file), mode, compression, **options)


def _read_file(source: Source, file: DataFile | None) -> Iterable[tuple[int, dict[str, Any] | RowFault]]:
    """Return the rows of a file, or of a data set of the hub, by line or number."""
    kind = kind_of_file(file) if file else ""
    if str(file).endswith(".zst") and "zstd" not in fsspec.available_compressions():
        raise UserError("`pip install zstandard` installs what unpacks it")
    if kind in (".jsonl", ".json"):
        return _read_json(str(file), source)
    if kind in (".csv", ".tsv"):
        return enumerate(_read_csv(str(file), source, "\t" if kind == ".tsv" else ","), start=1)
    batches = _read_arrow(str(file), kind) if file else _read_hub(source)
    rows = (
        {field.name: _to_plain(row[field.name], field.type) for field in batch.schema}
        for batch in batches
        for row in batch.to_pylist()
    )
    return enumerate(rows, start=1)


def _read_hub(source: Source) -> Iterator[Any]:
    """Yield tables of a few rows of a data set of the hub."""
    from datasets import load_dataset

    options = {"data_files": source.data_files, "split": source.split, "revision": source.revision}
    rows: Any = load_dataset(source.path, source.name, **options)
    # as Arrow: ``datasets`` itself would fetch the URLs and open the files that a column of images names
    yield from rows.with_format("arrow").iter(_ROWS_AT_A_TIME)


def _read_arrow(file: str, kind: str) -> Iterator[Any]:
    """Yield batches of a few rows of a parquet or Arrow file."""
    import pyarrow
    import pyarrow.parquet

    with _open(file, "rb") as stream:
        if kind == ".parquet":
            yield from pyarrow.parquet.ParquetFile(stream).iter_batches(_ROWS_AT_A_TIME)
            return
        try:
            batches = iter(pyarrow.ipc.open_stream(stream))
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(stream)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            batch.validate(full=True)
            yield from (batch.slice(start, _ROWS_AT_A_TIME) for start in range(0, len(batch), _ROWS_AT_A_TIME))


def _read_start(file: str, source: Source) -> tuple[str, str]:
    """Return the encoding of a text file, by its byte order mark or the source, and the file's first line."""
    with _open(file, "rb") as stream:
        start = stream.read(1 << 16)
    encoding = next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), source.encoding)
    return encoding, start.decode(encoding, errors="replace").partition("\n")[0]


def _read_json(file: str, source: Source) -> Iterator[tuple[int, dict[str, Any] | RowFault]]:
    """Yield the rows of a JSON file: one object per line, or the elements of one array. Blank lines are skipped."""
    # Bytes that cannot be decoded make their row bad, not the file.
    options = {"encoding": _read_start(file, source)[0], "errors": "surrogateescape", "newline": "\n"}
    with _open(file, "r", **options) as lines:
        is_first = True
        for number, line in enumerate(_read_lines(lines), start=1):
            text = line.strip("\ufeff \t\r\n")  # Windows editors write a BOM, also inside concatenated files
            if is_first and text.startswith("["):
                yield from enumerate(
                    map(_check_object, _parse_json(line.removeprefix("\ufeff") + lines.read())), start=1
                )
                return
            if len(line) > MAX_TEXT:
                yield number, RowFault(TOO_MUCH_TEXT)
            elif text:
                is_first = False
                try:
                    yield number, _check_object(_parse_json(text))
                except RowFault as fault:
                    yield number, fault


def _read_lines(stream: TextIO) -> Iterator[str]:
    """Yield lines; the rest of one with more than ``MAX_TEXT`` is left out."""
    while line := stream.readline(MAX_TEXT + 1):
        yield line
        is_cut = len(line) > MAX_TEXT
        while is_cut and line and not line.endswith("\n"):
            line = stream.readline(1 << 20)


def _parse_json(text: str) -> Any:
    try:
        text.encode()
        return json.loads(text, object_pairs_hook=_check_keys)
    except UnicodeEncodeError:
        raise RowFault(f"not UTF-8 text: save it as UTF-8, or {_ADVICE}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested a thousand deep
        raise RowFault(f"not JSON: {error}") from error


def _check_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} is there twice")
    return values


def _check_object(values: Any) -> dict[str, Any] | RowFault:
    return values if isinstance(values, dict) else RowFault(f"{kind_of(values)}, expected a JSON object")


def _read_csv(file: str, source: Source, usual_delimiter: str) -> Any:
    """Return the rows of a CSV file; all values are strings."""
    import pandas

    encoding, header = _read_start(file, source)
    delimiter, other = source.delimiter or usual_delimiter, re.search(r"[;|\t,]", header)
    if other and not source.delimiter and delimiter not in header:
        name = other[0].replace("\t", "\\t")
        raise RowFault(f'its one column is {header.strip()!r}: name the delimiter, as in `delimiter: "{name}"`')
    with warnings.catch_warnings(action="error", category=pandas.errors.ParserWarning):  # of fields that are left out
        options: Any = {"dtype": str, "na_filter": False, "index_col": False}
        frame = pandas.read_csv(file, sep=delimiter, encoding=encoding, nrows=source.rows, **options)
    return frame.to_dict("records")


def _to_plain(value: Any, kind: Any) -> Any:
    """Return a value of an Arrow type without what Arrow adds: the keys that a struct lacks, and quotes of JSON."""
    if getattr(kind, "extension_name", "") == "arrow.json" and isinstance(value, str):
        return json.loads(value)
    kind = getattr(kind, "storage_type", kind)
    if isinstance(value, dict):
        return {key: _to_plain(item, kind.field(key).type) for key, item in value.items() if item is not None}
    return [_to_plain(item, getattr(kind, "value_type", None)) for item in value] if isinstance(value, list) else value
