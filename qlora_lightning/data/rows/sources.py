"""Find the local files, URLs or hub data set that ``data.train`` names."""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qlora_lightning.support.errors import UserError, nearest

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

DataFile = Path | str
"""A file of this machine, or the URL of one."""


@dataclass(frozen=True)
class RowSettings:
    """How the rows of a source are read: by ``data.format``, ``data.columns`` etc., or by the source's own entry."""

    format: str = "auto"  # or the name of a format, or the dotted path of a function ``row -> conversation``
    columns: Mapping[str, str | None] = field(default_factory=dict)  # {their name: our name}; None leaves one out
    system: str | None = None  # a system prompt for conversations that have none
    roles: Mapping[str, str] = field(default_factory=dict)  # {their name: system | user | assistant | tool}


@dataclass(frozen=True, eq=False)  # a file that is named twice is two sources
class Source:
    """One entry of ``data.train``: a file, a folder, a glob, a URL, or a data set of the hub."""

    path: str  # as the user wrote it
    files: tuple[DataFile, ...] = ()  # sorted; none for a hub data set
    weight: float | None = None  # its share in a mixture, relative to the other sources
    split: str | None = None  # of a hub data set, as in ``datasets``, like the next three
    name: str | None = None  # the configuration
    revision: str | None = None
    data_files: Any = None
    rows: int | None = None  # the most rows to read, from the first
    encoding: str = "utf-8"
    delimiter: str | None = None  # of CSV files; None: a comma, in .tsv a tab
    settings: RowSettings = RowSettings()

    @property
    def is_remote(self) -> bool:
        """Whether reading the source needs a network."""
        return not self.files or any(isinstance(file, str) for file in self.files)


_ROW_KEYS = tuple(setting.name for setting in fields(RowSettings))
_KEYS = ("path", "weight", "rows", *_ROW_KEYS, "encoding", "delimiter", *_HUB_KEYS)


def find_sources(
    value: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
    split: str,
    settings: RowSettings | None = None,
    encoding: str = "utf-8",
) -> list[Source]:
    """Find the files behind ``data.train``, ``data.val``, ``data.test`` or ``data.predict``.

    The value is a file, folder, glob, URL or hub id; a mapping with ``path`` and any of the other fields of ``Source``
    and ``RowSettings``; or a list of these. Settings and encoding are defaults for sources that name none.
    """
    entries = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    default = Source("", encoding=encoding, settings=settings or RowSettings())
    sources = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            entry = {"path": entry}
        if split != "train" and "weight" in entry:
            raise UserError(f"data.{split}: a weight is a share of a training epoch: leave it out.")
        try:
            sources.append(_find(entry, _SPLITS.get(split, "test"), default))
        except UserError as error:
            raise UserError(f"data.{split}: {error}") from error
    return sources


def has_settings(value: Any) -> bool:
    """Whether what ``data.train`` names has a weight, or settings for the rows of one source."""
    entries = value if isinstance(value, list) else [value]
    keys = {key for entry in entries if isinstance(entry, Mapping) for key in entry}
    return not keys.isdisjoint(("weight", *_ROW_KEYS))


def _find(entry: Mapping[str, Any], split: str, default: Source) -> Source:
    path = str(entry.get("path") or "")
    if not path:
        raise UserError(f"expected a file, folder, glob or hub id, or a mapping with `path`, found {entry!r}.")
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"{path}: expected {', '.join(_KEYS)}, found {key!r}.{nearest(str(key), _KEYS)}")
    options = {key: value for key, value in entry.items() if value is not None or key == "system"}
    for key, kind in (("weight", int | float), ("rows", int)):
        value = options.get(key, 1)
        if not isinstance(value, kind) or not 0 < value < float("inf"):
            raise UserError(f"{key} of {path} must be a number above 0, found {value!r}.")
    settings = replace(default.settings, **{key: options.pop(key) for key in _ROW_KEYS if key in options})
    source = replace(default, **{**options, "path": path, "settings": settings})

    hub_keys = [key for key in _HUB_KEYS if key in options]
    file = Path(path).expanduser()
    is_hub_id = _HUB_ID.fullmatch(path) and not kind_of_file(path) and (hub_keys or not file.parent.is_dir())
    if is_hub_id and not file.exists():
        return replace(source, split=source.split or split)
    if hub_keys:
        raise UserError(f"{hub_keys[0]} is for data sets of the hub, but {path} is a path.")
    files: list[Any] = _list_urls(path) if "://" in path else _list_files(file)
    if "*" not in path and not kind_of_file(path) and ("://" in path or file.is_dir()):
        files = _of_split(files, path.rstrip("/") if "://" in path else str(file), split)
    if not files:
        raise UserError(f"no {split} files in {path}: expected {', '.join(KINDS)}, not named after another split.")
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


def has_split(path: str | os.PathLike[str], split: str) -> bool:
    """Whether a path is a local folder in which files or folders are named after a split."""
    folder = Path(path).expanduser()
    files = list_folder(folder) if folder.is_dir() else []
    return any(_split_of(str(file.relative_to(folder))) == _SPLITS[split] for file in files)


def _list_urls(path: str) -> list[str]:
    """Return the URL of a file, or the URLs of the data files in a remote folder or glob."""
    if kind_of_file(path) and "*" not in path:
        return [path]
    from fsspec.core import url_to_fs

    filesystem, pattern = url_to_fs(path if "*" in path else f"{path.rstrip('/')}/**")
    return sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(pattern) if kind_of_file(name))


def _list_files(path: Path) -> list[Path]:
    """Return a file, or the data files in a folder or glob."""
    if path.is_dir():
        return list_folder(path)
    files = [path] if path.exists() else [Path(name) for name in glob.iglob(str(path), recursive=True)]
    if not files and not glob.has_magic(str(path)):
        raise UserError(
            f"data file {path} does not exist (paths are relative to the current folder, {Path.cwd()}; of a data set "
            f"of the hub name the split).{nearest(str(path), map(str, path.parent.glob('*')))}"
        )
    return sorted(file for file in files if kind_of_file(file))


def list_folder(folder: Path) -> list[Path]:
    """List data files at any depth, without hidden ones and those that ``datasets`` saves beside rows."""
    files = (Path(name) for name in glob.iglob(f"{glob.escape(str(folder))}/**", recursive=True))
    return sorted(file for file in files if kind_of_file(file) and file.is_file() and not _BESIDE.fullmatch(file.name))


def kind_of_file(file: DataFile) -> str:
    """Return the kind of a file by its name: ``.jsonl`` for ``a.jsonl.gz``; an empty string if it is none."""
    name = file.partition("?")[0] if isinstance(file, str) else file.name
    name = _COMPRESSED.sub("", name.lower())
    return next((kind for kind in KINDS if name.endswith(kind)), "")
