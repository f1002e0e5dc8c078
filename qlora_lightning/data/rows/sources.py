"""From what ``data.train`` names to files that exist, or to a data set of the hub."""

import difflib
import glob
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_lightning.support.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")  # a version at the end of a hub id, "-v1.5", is none
_HUB_KEYS = ("split", "name", "revision")
_KEYS = ("path", "weight", *_HUB_KEYS)
_SPLITS = {"train": "train", "val": "validation"}  # else: test


@dataclass(frozen=True)
class RowSettings:
    """How the rows of a source are read: what ``data.format`` and its neighbours say, or the source's own entry.

    Attributes:
        format: ``auto``, the name of a format, or the dotted path of a function ``row -> conversation``.
        columns: other names for columns, ``{their name: our name}``; None leaves a column out.
        system: a system prompt for conversations that have none.
    """

    format: str = "auto"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    system: str | None = None


@dataclass(frozen=True)
class Source:
    """One entry of ``data.train``: a file, a folder, a glob, or a data set of the hub.

    Attributes:
        path: as the user wrote it.
        files: the data files, sorted; none for a hub data set.
        weight: its share in a mixture, relative to the other sources; None where none is given.
        split: of a hub data set, as ``datasets`` takes it.
        name: of a hub data set, the configuration.
        revision: of a hub data set: branch, tag or commit.
        streaming: whether a hub data set is read from the network, row by row, rather than downloaded first.
        settings: how its rows are read.
        shard_seed: of the order in which the shards of a streamed hub data set are read; None for their own.
    """

    path: str
    files: tuple[Path, ...] = ()
    weight: float | None = None
    split: str | None = None
    name: str | None = None
    revision: str | None = None
    streaming: bool = False
    settings: RowSettings = RowSettings()
    shard_seed: int | None = None


_NO_SETTINGS = RowSettings()


def find_sources(
    value: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
    split: str,
    streaming: bool = False,
    settings: RowSettings = _NO_SETTINGS,
) -> list[Source]:
    """Find the files behind ``data.train``, ``data.val``, ``data.test`` or ``data.predict``; touches no network.

    Args:
        value: a file, folder, glob or hub id; a mapping with ``path`` and, if wanted, ``weight``, ``split``, ``name``
            and ``revision``; or a list of these.
        split: ``train``, ``val``, ``test`` or ``predict``: named in messages, and the default split of a hub data set
            (``train``, ``validation``, ``test``, ``test``).
        streaming: read hub data sets from the network, without keeping them.
        settings: those of sources that name none of their own.

    Raises:
        UserError: a file does not exist, is empty or of an unknown kind; a folder or glob has no data files; an entry
            has unknown keys; or a weight is no positive number, or given for some sources only.
    """
    entries = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not entries:
        raise UserError(f"data.{split}: expected at least one file, folder, glob or hub id, found an empty list.")
    sources = [_find(_check_entry(entry, split), split, streaming) for entry in entries]
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        without = next(source for source in sources if source.weight is None)
        raise UserError(f"data.{split}: {weighted[0].path} has a weight, {without.path} has none: give all or none.")
    return [replace(source, settings=settings) for source in sources]


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
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UserError(f"data.{split}: expected {', '.join(_KEYS)}, found {key!r}{hint}")
        if key in _HUB_KEYS and not isinstance(value, str | None):
            raise UserError(f"data.{split}: {key} of {entry['path']} must be text, found {value!r}.")
    weight = entry.get("weight")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and math.isfinite(weight) and weight > 0):
        raise UserError(f"data.{split}: the weight of {entry['path']} must be a number above 0, found {weight!r}.")
    return {**entry, "path": str(entry["path"])}


def _find(entry: dict[str, Any], split: str, streaming: bool) -> Source:
    path, weight = entry["path"], entry.get("weight")
    weight = None if weight is None else float(weight)
    hub: dict[str, Any] = {key: entry.get(key) for key in _HUB_KEYS}
    given = [key for key, value in hub.items() if value]
    file = Path(path).expanduser()
    if not file.exists() and _is_hub_id(path, explicit=bool(given)):
        hub["split"] = hub["split"] or _SPLITS.get(split, "test")
        return Source(path, (), weight, **hub, streaming=streaming)
    if given:
        raise UserError(f"data.{split}: {given[0]} is for data sets of the hub, but {path} is a path.")
    files = _find_files(path, file, split)
    if not files:
        raise UserError(f"data.{split}: no data files in {path}: expected {describe_kinds()}.")
    for each in files:
        _check_file(each, split)
    return Source(path, tuple(files), weight)


def _find_files(path: str, file: Path, split: str) -> list[Path]:
    """Return the files of a path, a folder or a glob; ``file`` is the path without ``~``."""
    if file.is_dir():
        return list_folder(file)
    if file.exists():
        return [file]
    if not glob.has_magic(path):
        raise UserError(f"data.{split}: {_describe_missing(path, file, split)}")
    matches = [Path(match) for match in glob.glob(str(file), recursive=True)]
    if not matches:
        raise UserError(f"data.{split}: nothing matches {path} (relative to the current folder, {Path.cwd()}).")
    files = [each for match in matches for each in (list_folder(match) if match.is_dir() else [match])]
    return sorted({each for each in files if kind_of(each)[0]})


def _is_hub_id(path: str, explicit: bool) -> bool:
    """Return whether a name that does not exist here means the hub, and is no misspelt path."""
    if not _HUB_ID.fullmatch(path) or path.startswith("-"):
        return False
    return explicit or not (_SUFFIX.search(path) or Path(path).parent.is_dir())


def list_folder(folder: Path) -> list[Path]:
    """List data files at any depth; hidden ones and those of other kinds are passed over."""
    files = (file for file in folder.rglob("*") if kind_of(file)[0] and file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _check_file(file: Path, split: str) -> None:
    if not file.is_file():
        raise UserError(f"data.{split}: {file} is neither a file nor a folder.")
    if not kind_of(file)[0]:
        raise UserError(f"data.{split}: {file} ends in {file.suffix or 'nothing'!r}: expected {describe_kinds()}.")
    if not file.stat().st_size:
        raise UserError(f"data.{split}: {file} is empty: it holds no rows.")


def _describe_missing(name: str, file: Path, split: str) -> str:
    message = f"data file {name} does not exist (paths are relative to the current folder, {Path.cwd()})"
    change = "Change to the folder that it is relative to (of a run: where it was started)"
    remedy = "" if file.is_absolute() else f" {change}, or give --data.{split} FILE."
    if not file.parent.is_dir():
        return f"{message}: there is no folder {file.parent} either.{remedy}"
    near = difflib.get_close_matches(file.name, [entry.name for entry in file.parent.iterdir()], n=1)
    if near:
        return f"{message}: did you mean {file.parent / near[0]}?"
    hub = f" For the data set of the hub write {{path: {name}, split: train}}." if _HUB_ID.fullmatch(name) else ""
    return f"{message}.{hub or remedy}"


def kind_of(file: Path) -> tuple[str, str]:
    """Return kind and compression by the file's name: ``a.jsonl.gz`` is ``(".jsonl", ".gz")``, else empty strings."""
    name = file.name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    return next((suffix for suffix in KINDS if name.endswith(suffix)), ""), compression


def describe_kinds() -> str:
    """Name the suffixes that are read."""
    return f"{', '.join(KINDS[:-1])} or {KINDS[-1]}, each also compressed ({', '.join(COMPRESSIONS)})"
