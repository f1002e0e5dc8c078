"""The files, URLs and data sets of the hub that ``data.train`` names, and their rows, a few in memory at a time."""

import codecs
import csv
import glob
import hashlib
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import fsspec
import fsspec.core

from qlora_lightning.data.rows.content import MAX_TEXT, TOO_LARGE, RowFault, kind_of, parse_json
from qlora_lightning.support.console import count_of
from qlora_lightning.support.errors import UserError, bounded, explaining, nearest
from qlora_lightning.support.files import load_json
from qlora_lightning.support.settings import NUMBERS
from qlora_lightning.support.values import check_setting, fits

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_COMPRESSED = re.compile(r"\.(gz|bz2|xz|zst)$")
_BESIDE = re.compile(r"cache-.*\.arrow|(dataset_info|dataset_dict|state)\.json")  # saved by ``datasets`` beside rows
_HUB_ID = re.compile(r"\w[\w.-]*/[\w-][\w.-]*")
_HUB_KEYS = ("split", "name", "revision", "data_files")
# splits as `datasets` names them, by the words for them in keys and in names of files and folders
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPLIT_NAME = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])")

_ROWS_AT_A_TIME = 4  # a page of a few kB may unpack to many rows of many MB
_PART = 1 << 23  # characters of an array
_MOST_LINES = 100  # of a bad row of CSV: more are the rows between two stray quotes
_UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that are not of the file's encoding
_NOT_UTF8 = (
    "not UTF-8 text: save it as UTF-8, or name its encoding, as in `encoding: cp1252` (what Excel writes in Western "
    "Europe)"
)
# encodings of files that begin with a byte order mark
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig"}

DELIMITERS = ",;\t|"  # of CSV files, as header and first row show them

DataFile = Path | str
"""A file of this machine, or the URL of one."""
RowFunction = Callable[[dict[str, Any]], Any]
"""Makes a conversation of a row."""


@dataclass(frozen=True, eq=False)  # a file that is named twice is two sources
class Source:
    """One entry of ``data.train``: a file, a folder, a glob, a URL, or a data set of the hub; and how to read it."""

    path: str  # as the user wrote it
    files: tuple[DataFile, ...] = ()  # sorted; none for a hub data set
    weight: float | None = None  # its share in a mixture, relative to the other sources
    rows: int | None = None  # the most rows to read, from the first
    format: str | RowFunction = "auto"  # or the name of a format, or a function or its dotted path
    columns: Mapping[str, str | None] = field(default_factory=dict)  # {their name: our name}; None leaves one out
    roles: Mapping[str, str] = field(default_factory=dict)  # {their name: system | user | assistant | tool}
    system: str | None = None  # a system prompt for conversations that have none
    encoding: str = "utf-8"
    delimiter: str | None = None  # of CSV files; None: a comma, in .tsv a tab, or what the first rows show
    split: str | None = None  # of a hub data set, as in ``datasets``, like the next three
    name: str | None = None  # the configuration
    revision: str | None = None
    data_files: Any = None

    @property
    def is_remote(self) -> bool:
        """Whether reading the source needs a network."""
        return not self.files or any(isinstance(file, str) for file in self.files)


_KEYS = [setting.name for setting in fields(Source) if setting.name != "files"]
# of the keys of a source that are no numbers: its kind, and how an error describes it
_KINDS: dict[str, tuple[Any, str]] = {
    "path": (str | os.PathLike, "a file, folder, glob, URL or hub id"),
    "format": (str | Callable, "the name of a format, or the dotted path of a function"),
    "columns": (Mapping[str, str | None], "{their name: our name}, a name in quotes if it reads as a number or bool"),
    "roles": (
        Mapping[str, Literal["system", "user", "assistant", "tool"]],
        "{their name: system, user, assistant or tool}, a name in quotes if it reads as a number or bool",
    ),
    "system": (str | None, "a text"),
    "encoding": (str, "the name of an encoding, such as cp1252"),
    "delimiter": (str, 'one character, and no quote or end of a line; a tab in YAML is "\\t", in quotes'),
    **dict.fromkeys(("split", "name", "revision"), (str, "a text, in quotes if it reads as a number")),
    "data_files": (str | list[str] | Mapping[str, str | list[str]], "a name, a list of names, or {split: names}"),
}


class Row(NamedTuple):
    """One dict of a data file."""

    values: dict[str, Any]
    file: str  # the path as the user wrote it, or below that folder; for a data set of the hub its id
    line: int  # where it begins in JSON lines and CSV; else the number of the row; from 1
    source: Source | None = None  # from which it was read, and which says how; None: as ``data:`` says

    @property
    def where(self) -> str:
        """File and line, with which messages about this row begin: ``train.jsonl:17``."""
        return f"{self.file}:{self.line}"


class BadRow(NamedTuple):
    """A rejected row: its file and line (``train.jsonl:17``), the reason, and its source as in ``Row``."""

    where: str
    reason: str
    source: Source | None = None


_Values = dict[str, Any] | RowFault
"""Keys and values of a row, or why it cannot be read."""

# ---- sources ---------------------------------------------------------------------------------------------------------


def find_sources(
    value: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]], split: str, default: Source
) -> list[Source]:
    """Find the files of ``data.train``, ``data.val``, ``data.test`` or ``data.predict``.

    The value is a file, folder, glob, URL or hub id; a mapping with ``path`` and any of the other fields of ``Source``;
    or a list of these. What an entry does not name is taken from ``default``.
    """
    sources = []
    for entry in _entries_of(value):
        if split != "train" and "weight" in entry:
            raise UserError(f"data.{split}: a weight is a share of a training epoch: leave it out.", f"data.{split}")
        try:
            sources.append(_find(entry, _SPLITS.get(split, "test"), default))
        except UserError as error:
            raise UserError(f"data.{split}: {error}", f"data.{split}") from error
    if not sources:
        raise UserError(f"data.{split} is an empty list: expected files in it, or null.", f"data.{split}")
    return sources


def _entries_of(value: Any) -> list[Mapping[str, Any]]:
    """Return what ``data.train`` names as mappings with ``path``."""
    entries = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [entry if isinstance(entry, Mapping) else {"path": entry} for entry in entries]


def name_of_format(format: str | RowFunction) -> str:
    """Return the name of a format, that of a function as it would be written in a config."""
    if isinstance(format, str):
        return format
    return f"{getattr(format, '__module__', '')}.{getattr(format, '__qualname__', type(format).__name__)}"


def check_kind(key: str, value: Any, name: str) -> None:
    """Reject the value of a source's key that is of another kind; ``name`` is the key as the error has it."""
    if bounds := NUMBERS.get(f"source.{key}"):
        check_setting(name, value, value in bounds, bounds.expected)
        return
    kind, expected = _KINDS[key]
    is_valid = fits(value, kind)
    if is_valid and key == "delimiter":
        is_valid = len(value) == 1 and value not in '"\r\n'
    check_setting(name, value, is_valid, expected)


def has_settings(value: Any) -> bool:
    """Whether what ``data.train`` names has a weight, or settings for the rows of one source."""
    keys = {key for entry in _entries_of(value) for key in entry}
    return not keys.isdisjoint(("weight", "format", "columns", "roles", "system"))


def find_folders(train: Any, split: str) -> list[Any]:
    """Return the entries of ``data.train`` that name a whole local folder with files of another split."""
    entries = []
    for entry in _entries_of(train):
        folder = Path(str(entry.get("path"))).expanduser()
        files = _list_folder(folder) if folder.is_dir() and {"rows", "weight"}.isdisjoint(entry) else []
        if any(_split_of(str(file.relative_to(folder))) == _SPLITS[split] for file in files):
            entries.append(entry)
    return entries


def _find(entry: Mapping[str, Any], split: str, default: Source) -> Source:
    path = entry.get("path")
    if not path or not fits(path, _KINDS["path"][0]):
        raise UserError(f"expected {_KINDS['path'][1]}, or a mapping with `path`, found {entry!r}.")
    path = str(path)
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"{path}: expected {', '.join(_KEYS)}, found {key!r}.{nearest(str(key), _KEYS)}")
    options = {key: value for key, value in entry.items() if value is not None or key == "system"}
    for key, value in options.items():
        check_kind(key, value, f"{key} of {path}")
    source = replace(default, **{**options, "path": path})

    hub_keys = [key for key in _HUB_KEYS if key in options]
    file = Path(path).expanduser()
    is_hub_id = _HUB_ID.fullmatch(path) and not kind_of_file(path) and (hub_keys or not file.parent.is_dir())
    if is_hub_id and not file.exists():
        return replace(source, split=source.split or split)
    if hub_keys:
        raise UserError(f"{hub_keys[0]} is for data sets of the hub, but {path} is a path.")
    is_url = "://" in path
    files: list[Any] = _list_urls(path) if is_url else _list_files(file)
    if file.is_dir() or (is_url and "*" not in path and not kind_of_file(path)):
        files = _of_split(files, path.rstrip("/") if is_url else str(file), split)
    if not files:
        place = f"the folder {path}" if file.is_dir() else path
        raise UserError(f"no {split} files in {place}: expected {', '.join(KINDS)}, not named after another split.")
    return replace(source, files=tuple(files))


def _of_split(files: list[Any], folder: str, split: str) -> list[Any]:
    """Return a folder's files of a split, else those named after no split; for training both."""
    splits = {file: _split_of(str(file).removeprefix(folder)) for file in files}
    if split == "train":
        return [file for file, name in splits.items() if name in ("train", None)]
    split_files = [file for file, name in splits.items() if name == split]
    return split_files or [file for file, name in splits.items() if name is None]


def _split_of(path: str) -> str | None:
    """Return the split after which a file or its folder is named; ``math_dev-0.csv`` is validation."""
    for part in reversed(Path(path).parts):
        if names := _SPLIT_NAME.findall(part.lower()):
            return _SPLITS[names[-1]]
    return None


def _list_urls(path: str) -> list[str]:
    """Return the URL of a file, or the URLs of the data files in a remote folder or glob."""
    if kind_of_file(path) and "*" not in path:
        return [path]
    filesystem, pattern = fsspec.core.url_to_fs(path if "*" in path else f"{path.rstrip('/')}/**")
    return sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(pattern) if kind_of_file(name))


def _list_files(path: Path) -> list[Path]:
    """Return a file, or the data files in a folder or glob."""
    if path.is_dir():
        return _list_folder(path)
    if path.exists() or path.is_symlink():
        if not path.is_file():
            _check_link(path)
            raise UserError(f"{path} is a pipe or a device: expected a file.")
        return [path] if kind_of_file(path) else []
    found = _glob(str(path))
    if not found and not glob.has_magic(str(path)):
        raise UserError(
            f"data file {path} does not exist (paths are relative to the current folder, {Path.cwd()}; of a data set "
            f"of the hub name the split).{nearest(str(path), map(str, path.parent.glob('*')))}"
        )
    if found and all(each.is_dir() for each in found):
        raise UserError(f"{path} matches folders alone: name one of them, or files in them, as in {path}/*.jsonl.")
    return _take_files(found)


def _list_folder(folder: Path) -> list[Path]:
    """List data files at any depth, without hidden ones and those that ``datasets`` saves beside rows."""
    return _take_files(file for file in _glob(f"{glob.escape(str(folder))}/**") if not _BESIDE.fullmatch(file.name))


def _glob(pattern: str) -> list[Path]:
    with bounded(f"{pattern} cannot be listed", "file.unreadable"):  # links in a folder may lead back into it
        return [Path(name) for name in glob.iglob(pattern, recursive=True)]


def _take_files(paths: Iterable[Path]) -> list[Path]:
    """Return the data files of what is in a folder or glob, sorted: no folder, and no pipe, which would be waited for.

    A link that leads nowhere is an error: its rows would be missing without a word.
    """
    files = sorted(path for path in paths if kind_of_file(path))
    for file in files:
        _check_link(file)
    return [file for file in files if file.is_file()]


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist.")


def kind_of_file(file: DataFile) -> str:
    """Return the kind of a file by its name: ``.jsonl`` for ``a.jsonl.gz``; an empty string if it is none."""
    name = file.partition("?")[0] if isinstance(file, str) else file.name
    name = _COMPRESSED.sub("", name.lower())
    return next((kind for kind in KINDS if name.endswith(kind)), "")


# ---- rows ------------------------------------------------------------------------------------------------------------


def read_rows(source: Source) -> Iterator[Row | BadRow]:
    """Yield the rows of a source, also those that cannot be read, in order.

    Raises:
        UserError: a file cannot be read or is damaged, or the source has no rows.
    """
    rows = itertools.islice(_read_files(source), source.rows)
    first_row = next(rows, None)
    if first_row is None:
        raise UserError(f"{source.path} is empty: it holds no rows.", "file.empty")
    yield first_row
    yield from rows


def count_lines(values: Iterable[Any]) -> int:
    """Count the lines that a row has in its CSV file, by the line breaks in its values."""
    return 1 + sum(str(value).count("\n") for value in values)


def find_delimiters(source: Source) -> Iterator[tuple[str, str]]:
    """Yield the CSV files of a source that are read by an unusual delimiter that it does not name, and that."""
    for file in map(str, source.files):
        if source.delimiter is None and kind_of_file(file) in (".csv", ".tsv"):
            with explaining(f"{file} cannot be read", "file.unreadable"):
                delimiter = _choose_delimiter(file, source)
            if delimiter != _usual_delimiter(file):
                yield file, delimiter


def hash_source(source: Source) -> str:
    """Return a hash of the bytes of a source's local files, or of the identity of a hub data set in ``datasets``."""
    digest = hashlib.blake2b(digest_size=20)
    if not source.files:
        with explaining(f"data set {source.path} cannot be read", "file.unreadable"):
            from datasets import load_dataset_builder as load

            builder = load(source.path, source.name, data_files=source.data_files, revision=source.revision)
        digest.update(f"{builder.hash} {builder.config_id}".encode())
    for file in source.files:
        with explaining(f"{file} cannot be read", "file.unreadable"), Path(file).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def _read_files(source: Source) -> Iterator[Row | BadRow]:
    for file in source.files or (None,):
        name = source.path if file is None else str(file)
        with explaining(f"{name if file else f'data set {name}'} cannot be read", "file.unreadable"):
            for number, values in _read_file(source, file):
                if isinstance(values, RowFault):
                    yield BadRow(f"{name}:{number}", str(values), source)
                else:
                    yield Row(values, name, number, source)


def _read_file(source: Source, file: DataFile | None) -> Iterable[tuple[int, _Values]]:
    """Return the rows of a file, or of a data set of the hub, by line or number."""
    kind = kind_of_file(file) if file else ""
    if str(file).endswith(".zst") and "zstd" not in fsspec.available_compressions():
        raise ValueError("`pip install zstandard` installs what unpacks it")
    if kind in (".jsonl", ".json"):
        return _read_json(str(file), source)
    if kind in (".csv", ".tsv"):
        return _read_csv(str(file), source)
    batches = _read_arrow(str(file), kind) if file else _read_hub(source)
    return enumerate((values for batch in batches for values in _read_batch(batch)), start=1)


def _open(file: str, mode: str, **options: str) -> fsspec.core.OpenFile:
    """Open a file, unpacked. In the name of a local one ``::`` chains no file systems, and ``~`` is no home."""
    if "://" in file:
        return fsspec.open(file, mode, compression="infer", **options)
    compression = fsspec.core.get_compression(file, "infer")
    return fsspec.core.OpenFile(fsspec.filesystem("file"), os.path.abspath(file), mode, compression, **options)


def _open_text(file: str, source: Source) -> fsspec.core.OpenFile:
    """Open a text file, unpacked, in the encoding of its byte order mark, or else of its source."""
    with _open(file, "rb") as stream:
        start = stream.read(4)
    encoding = next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), source.encoding)
    # bytes that cannot be decoded make their row bad, not the file
    options = {"encoding": encoding, "errors": "surrogateescape", "newline": ""}
    return _open(file, "r", **options)


# JSON


def _read_json(file: str, source: Source) -> Iterator[tuple[int, _Values]]:
    """Yield the rows of a JSON file: one object per line, or the elements of one array. Blank lines are skipped."""
    with _open_text(file, source) as stream:
        start = stream.read(_PART).lstrip()
        if start.startswith("["):
            yield from enumerate(_read_array(start, stream), start=1)
            return
    with _open_text(file, source) as stream:
        for number, line in enumerate(stream, start=1):
            if text := line.strip("\ufeff \t\r\n"):  # Windows editors write a BOM, also inside concatenated files
                yield number, _parse_row(text)


def _read_array(text: str, stream: TextIO) -> Iterator[_Values]:
    """Yield the elements of a JSON array that begins with ``text`` and continues in a stream, one after another."""
    find_end, find_element = json.JSONDecoder().raw_decode, re.compile(r"[^\s,]").search
    n_rows, end = 0, 1
    while True:
        element = find_element(text, end)
        begin = element.start() if element else len(text)
        is_end, n_commas = text.startswith("]", begin), text.count(",", end, begin)
        expected = 1 if n_rows and not is_end else 0
        if element and n_commas != expected:
            place = "the end" if is_end else f"row {n_rows + 1}"
            raise ValueError(f"not JSON: commas before {place}: found {n_commas}, expected {expected}")
        if is_end:
            break
        try:
            _, element_end = find_end(text, begin)
        except json.JSONDecodeError as error:  # perhaps only because the rest of the element has not been read
            part = stream.read(_PART)
            if len(text) - end > MAX_TEXT:
                raise ValueError(f"row {n_rows + 1} has {TOO_LARGE}") from error
            if not part:
                raise ValueError(f"row {n_rows + 1} is not JSON, or the file ends in it: {error.msg}") from error
            text, end = text[end:] + part, 0
        else:
            n_rows, end = n_rows + 1, element_end
            yield _parse_row(text[begin:end])
    if text[begin + 1 :].strip() or stream.read().strip():
        raise ValueError("not JSON: text follows the array")


def _parse_row(text: str) -> _Values:
    if len(text) > MAX_TEXT:
        return RowFault(TOO_LARGE)
    if _UNDECODED.search(text):
        return RowFault(_NOT_UTF8)
    try:
        values = load_json(text)
    except ValueError as error:  # also a number of thousands of digits
        return RowFault(f"not JSON: {error}")
    return values if isinstance(values, dict) else RowFault(f"{kind_of(values)}, expected a JSON object")


# CSV


def _choose_delimiter(file: str, source: Source) -> str:
    """Return the delimiter of a CSV file: the one that its source names, else a comma, in .tsv a tab.

    If the header names several columns by another one alone, as a semicolon in what Excel writes in half of Europe, and
    the first row has as many, it is that one.
    """
    if source.delimiter:
        return source.delimiter
    marks = list[str]()
    with _open_text(file, source) as stream:
        for mark, lines in zip(DELIMITERS, itertools.tee(stream, len(DELIMITERS)), strict=True):
            records = (values for values in csv.reader(lines, delimiter=mark) if any(map(str.strip, values)))
            try:
                header = next(records, [])
                row = next(records, header)
            except csv.Error:
                continue
            names = list(filter(str.strip, header))
            # a quote inside a name: the delimiter is another
            if len(names) > 1 and '"' not in "".join(names) and len(row) == len(header):
                marks.append(mark)
    return marks[0] if len(marks) == 1 else _usual_delimiter(file)


def _usual_delimiter(file: str) -> str:
    return "\t" if kind_of_file(file) == ".tsv" else ","


def _read_csv(file: str, source: Source) -> Iterator[tuple[int, _Values]]:
    """Yield the rows of a CSV file and the lines where they begin; all values are strings. Blank lines are skipped."""
    csv.field_size_limit(MAX_TEXT)  # by default 131,072 characters; it holds for the process
    delimiter = _choose_delimiter(file, source)
    with _open_text(file, source) as stream:
        records = _read_records(stream, delimiter)
        _, header = next(records, (1, []))
        if isinstance(header, RowFault):
            raise ValueError(str(header))
        names = list(filter(None, header))
        _check_names(names)
        for line, values in records:
            if isinstance(values, RowFault):
                yield line, values
            elif len(values) != len(header):
                lines = count_lines(values)
                if lines > _MOST_LINES:
                    raise ValueError(
                        f"the row that begins in line {line} has {count_of(len(values), 'value')} in {lines:,} lines, "
                        f"but the header has {len(header)}: a stray quote makes one row of all rows to the next quote"
                    )
                found = f"{count_of(len(values), 'value')}{f' in {lines:,} lines' if lines > 1 else ''}"
                fault = f"has {found}, but the header has {len(header)}"
                yield line, RowFault(f"{fault} (read by {delimiter!r}, which `delimiter:` changes)")
            else:  # those below no name are left out
                yield line, {name: value for name, value in zip(header, values, strict=True) if name}


def _read_records(stream: TextIO, delimiter: str) -> Iterator[tuple[int, list[str] | RowFault]]:
    """Yield the values of each row of a CSV file, its header first, and the line where it begins.

    Raises:
        ValueError: a quote is not closed as it should be, and not in its line: which lines are rows nobody knows. A
            reader that continued would skip hundreds of rows as one, or take the rest of a text for a row.
    """
    last_line = deque[str](maxlen=1)

    def lines() -> Iterator[str]:
        for line in stream:
            last_line.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        begin = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > begin or last_line[0].count('"') % 2:
                raise ValueError(
                    f"the row that begins in line {begin} has a quote that is not closed, or one inside a quoted text "
                    f"that is not doubled, and no row can be told after it: {error}"
                ) from error
            yield begin, RowFault(f"not CSV: {error}")
        else:
            if _UNDECODED.search("".join(values)):
                yield begin, RowFault(_NOT_UTF8)
            elif values:
                yield begin, values


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have the same name, of {', '.join(names)}")


# parquet, Arrow and the hub


def _read_hub(source: Source) -> Iterator[Any]:
    """Yield record batches of a few rows of a data set of the hub."""
    from datasets import load_dataset

    options = {"data_files": source.data_files, "split": source.split, "revision": source.revision}
    rows: Any = load_dataset(source.path, source.name, **options)
    # as Arrow: ``datasets`` itself would fetch the URLs and open the files that a column of images names
    for table in rows.with_format("arrow").iter(_ROWS_AT_A_TIME):
        yield from table.to_batches()


def _read_arrow(file: str, kind: str) -> Iterator[Any]:
    """Yield record batches of a few rows of a parquet or Arrow file."""
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


def _read_batch(batch: Any) -> Iterator[_Values]:
    _check_names(batch.schema.names)
    for values in batch.to_pylist():
        try:
            yield {field.name: _to_plain(values[field.name], field.type, field.name) for field in batch.schema}
        except RowFault as fault:
            yield fault


def _to_plain(value: Any, kind: Any, column: str) -> Any:
    """Return a value of an Arrow type without what Arrow adds: the keys that a struct lacks, and quotes of JSON."""
    if getattr(kind, "extension_name", "") == "arrow.json":
        return parse_json(value, repr(column))
    kind = getattr(kind, "storage_type", kind)
    if isinstance(value, dict):
        return {key: _to_plain(item, kind.field(key).type, column) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_to_plain(item, getattr(kind, "value_type", None), column) for item in value]
    return value
