"""From what ``data.train`` names to files, local or behind a URL, or to a data set of the hub."""

import glob
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_lightning.support.errors import UserError, nearest

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")  # a version at the end of a hub id, "-v1.5", is none
_ROW_KEYS = ("format", "columns", "system", "roles")
_HUB_KEYS = ("split", "name", "revision", "data_files")
_KEYS = ("path", "weight", "rows", *_ROW_KEYS, "encoding", "delimiter", *_HUB_KEYS)
_SPLITS = {"train": "train", "val": "validation"}  # else: test

DataFile = Path | str
"""A file of this machine, or the URL of one."""


@dataclass(frozen=True)
class RowSettings:
    """How the rows of a source are read: what ``data.format`` and its neighbours say, or the source's own entry.

    Attributes:
        format: ``auto``, the name of a format, or the dotted path of a function ``row -> conversation``.
        columns: other names for columns, ``{their name: our name}``; None leaves a column out.
        system: a system prompt for conversations that have none.
        roles: other names for roles, ``{their name: system | user | assistant | tool}``.
    """

    format: str = "auto"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    system: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """One entry of ``data.train``: a file, a folder, a glob, a URL, or a data set of the hub.

    Attributes:
        path: as the user wrote it.
        files: the data files, sorted; none for a hub data set.
        weight: its share in a mixture, relative to the other sources; None where none is given.
        split: of a hub data set, as ``datasets`` takes it; or of a folder that ``DatasetDict.save_to_disk`` wrote.
        name: of a hub data set, the configuration.
        revision: of a hub data set: branch, tag or commit.
        data_files: of a hub data set: the files to read, as ``datasets`` takes them.
        rows: at most so many rows are read, from the first; None: all.
        encoding: of text files, as Python names it: ``utf-8``, ``latin-1``, ``utf-16``, …
        delimiter: of CSV files; None: whichever the header uses.
        streaming: whether a hub data set is read from the network, row by row, rather than downloaded first.
        settings: how its rows are read.
        shard_seed: of the order in which the shards of a streamed hub data set are read; None for their own.
    """

    path: str
    files: tuple[DataFile, ...] = ()
    weight: float | None = None
    split: str | None = None
    name: str | None = None
    revision: str | None = None
    data_files: Any = None
    rows: int | None = None
    encoding: str = "utf-8"
    delimiter: str | None = None
    streaming: bool = False
    settings: RowSettings = RowSettings()
    shard_seed: int | None = None

    @property
    def is_remote(self) -> bool:
        """Whether reading it needs a network."""
        return not self.files or any(isinstance(file, str) for file in self.files)


_NO_SETTINGS = RowSettings()


def find_sources(
    value: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
    split: str,
    streaming: bool = False,
    settings: RowSettings = _NO_SETTINGS,
    encoding: str = "utf-8",
) -> list[Source]:
    """Find the files behind ``data.train``, ``data.val``, ``data.test`` or ``data.predict``.

    The network is used only to list a folder or glob behind a URL.

    Args:
        value: a file, folder, glob, URL or hub id; a mapping with ``path`` and any of the other fields of ``Source``
            and ``RowSettings``; or a list of these.
        split: ``train``, ``val``, ``test`` or ``predict``: named in messages, and the default split of a hub data set
            (``train``, ``validation``, ``test``, ``test``).
        streaming: read hub data sets from the network, without keeping them.
        settings: those of sources that name none of their own.
        encoding: likewise.

    Raises:
        UserError: a file does not exist, is empty or of an unknown kind; a folder or glob has no data files; an entry
            has an unknown key or a wrong value; or only some sources have a weight.
    """
    entries = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not entries:
        raise UserError(f"data.{split}: expected at least one file, folder, glob or hub id, found an empty list.")
    read = Source("", encoding=encoding, settings=settings, streaming=streaming)
    sources = [_find(_check_entry(entry, split), split, read) for entry in entries]
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        without = next(source for source in sources if source.weight is None)
        raise UserError(f"data.{split}: {weighted[0].path} has a weight, {without.path} has none: give all or none.")
    return sources


def _check_entry(entry: Any, split: str) -> dict[str, Any]:
    """Return one entry as a mapping with known keys and values of the right types."""
    if isinstance(entry, str | Path):
        entry = {"path": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str | Path) or not str(entry["path"]):
        raise UserError(
            f"data.{split}: expected a file, folder, glob or hub id, or a mapping with `path`, found {entry!r}."
        )
    for key, value in entry.items():
        if key not in _KEYS:
            hint = nearest(str(key), _KEYS)
            raise UserError(f"data.{split}: {entry['path']}: expected {', '.join(_KEYS)}, found {key!r}.{hint}")
        expected = _EXPECTED.get(key)
        if expected and value is not None and not expected[1](value):
            raise UserError(f"data.{split}: {key} of {entry['path']} must be {expected[0]}, found {value!r}.")
    return {**entry, "path": str(entry["path"])}


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


_EXPECTED = {
    "weight": ("a number above 0", _is_weight),
    "columns": ("a mapping {their name: our name}", lambda value: isinstance(value, Mapping)),
    "rows": ("a whole number above 0", lambda value: type(value) is int and value > 0),
}


def _find(entry: dict[str, Any], split: str, defaults: Source) -> Source:
    path, weight, delimiter = entry["path"], entry.get("weight"), entry.get("delimiter")
    own = {key: entry[key] for key in _ROW_KEYS if entry.get(key) is not None or (key == "system" and key in entry)}
    source = Source(
        path,
        weight=None if weight is None else float(weight),
        rows=entry.get("rows"),
        encoding=entry.get("encoding") or defaults.encoding,
        delimiter=delimiter and delimiter.replace("\\t", "\t"),  # as a shell hands it over
        settings=replace(defaults.settings, **own),
    )
    hub: dict[str, Any] = {key: entry.get(key) for key in _HUB_KEYS}
    given = [key for key, value in hub.items() if value]
    file = Path(path).expanduser()
    if "://" not in path and not file.exists() and _is_hub_id(path, explicit=bool(given)):
        hub["split"] = hub["split"] or _SPLITS.get(split, "test")
        return replace(source, **hub, streaming=defaults.streaming)
    if (file / "dataset_dict.json").is_file():
        source = replace(source, split=entry.get("split") or _SPLITS.get(split, "test"))
        file, given = _find_saved_split(file, str(source.split), split), [key for key in given if key != "split"]
    if given:
        raise UserError(f"data.{split}: {given[0]} is for data sets of the hub, but {path} is a path.")
    files = _find_urls(path) if "://" in path else _find_files(path, file, split)
    if not files:
        raise UserError(f"data.{split}: no data files in {path}: expected {describe_kinds()}.")
    return replace(source, files=tuple(files))


def _is_hub_id(path: str, explicit: bool) -> bool:
    """Return whether a name that does not exist here means the hub, and is no misspelt path."""
    if not _HUB_ID.fullmatch(path) or path.startswith("-"):
        return False
    return explicit or not (_SUFFIX.search(path) or Path(path).parent.is_dir())


def _find_saved_split(folder: Path, name: str, split: str) -> Path:
    """Return the folder of one split of a ``DatasetDict`` that was saved to disk."""
    names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if name not in names:
        raise UserError(
            f"data.{split}: {folder} has no split {name!r}: name one of {', '.join(names)}, as in "
            f"{{path: {folder}, split: {names[0]}}}."
        )
    return folder / name


def _find_urls(path: str) -> list[str]:
    """Return the URLs of a file, or of the data files in a folder or glob behind a URL."""
    if kind_of(path)[0] and "*" not in path:
        return [path]
    from fsspec.core import url_to_fs

    system, root = url_to_fs(path)
    names = system.glob(root) if "*" in path else system.find(root)
    return sorted(system.unstrip_protocol(name) for name in names if kind_of(name)[0])


def _find_files(path: str, file: Path, split: str) -> list[Path]:
    """Return the files of a path, a folder or a glob; ``file`` is the path without ``~``."""
    if file.is_dir():
        files = list_folder(file)
    elif file.exists():
        files = [file]
    elif not glob.has_magic(path):
        raise UserError(f"data.{split}: {_describe_missing(path, file, split)}")
    else:
        matches = [Path(match) for match in glob.glob(str(file), recursive=True)]
        found = {each for match in matches for each in (list_folder(match) if match.is_dir() else [match])}
        files = sorted(each for each in found if kind_of(each)[0])
    for each in files:
        if not kind_of(each)[0]:
            raise UserError(f"data.{split}: {each} ends in {each.suffix or 'nothing'!r}: expected {describe_kinds()}.")
        if each.is_file() and not each.stat().st_size:
            raise UserError(f"data.{split}: {each} is empty: it holds no rows.")
    return files


def list_folder(folder: Path) -> list[Path]:
    """List data files at any depth; hidden ones and those of other kinds are passed over.

    Of a folder that ``Dataset.save_to_disk`` wrote, these are the files that its ``state.json`` names: beside them
    ``datasets`` keeps what it computed.
    """
    state = folder / "state.json"
    if state.is_file() and (folder / "dataset_info.json").is_file():
        return [folder / part["filename"] for part in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    files = (file for file in folder.rglob("*") if kind_of(file)[0] and file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _describe_missing(name: str, file: Path, split: str) -> str:
    beside = list(file.parent.iterdir()) if file.parent.is_dir() else []
    near = nearest(str(file), [str(each) for each in beside if kind_of(each)[0] or each.is_dir()])
    is_id = _HUB_ID.fullmatch(name) and not _SUFFIX.search(name)
    hub = f" For the data set of the hub write {{path: {name}, split: train}}." if is_id else ""
    remedy = f" Change to its folder (of a run: where it was started), or give --data.{split} FILE."
    message = f"data file {name} does not exist (paths are relative to the current folder, {Path.cwd()})."
    return f"{message}{near or hub or remedy}"


def kind_of(file: DataFile) -> tuple[str, str]:
    """Return kind and compression by the file's name: ``a.jsonl.gz`` is ``(".jsonl", ".gz")``, else empty strings."""
    name = (file.partition("?")[0] if isinstance(file, str) else file.name).lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    return next((suffix for suffix in KINDS if name.endswith(suffix)), ""), compression


def describe_kinds() -> str:
    """Name the suffixes that are read."""
    return f"{', '.join(KINDS[:-1])} or {KINDS[-1]}, each also compressed ({', '.join(COMPRESSIONS)})"
