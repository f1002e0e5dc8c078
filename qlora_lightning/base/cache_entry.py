"""One entry of the cache: a folder that is complete exactly when its ``entry.json`` says so."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

Json: TypeAlias = "str | int | float | bool | list[Json] | Mapping[str, Json] | None"
Kind: TypeAlias = Literal["unpacked", "quantized", "samples", "kernels"]

_ENTRY_FILE = "entry.json"


@dataclass(frozen=True)
class CacheEntry:
    """What the cache holds under one path; not ``complete``: a build that goes on now, was killed or was damaged."""

    kind: Kind
    label: str
    size_bytes: int
    created: datetime
    last_used: datetime
    path: Path
    complete: bool


def seal_entry(folder: Path, label: str, key: Mapping[str, Json]) -> None:
    """Flush every file of ``folder`` to the disk, then write the ``entry.json`` that makes it complete.

    Raises:
        OSError: the disk is full or fails.
    """
    sizes: dict[str, int] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        _flush(file)
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    created = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"label": label, "created": created, "key": key, "files": sizes}
    entry_file = folder / _ENTRY_FILE
    entry_file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _flush(entry_file)
    _flush(folder)


def read_entry(folder: Path, kind: Kind) -> CacheEntry | None:
    """Describe the entry in ``folder``; None where it is missing, incomplete or a file's size is not the noted one."""
    try:
        content = json.loads((folder / _ENTRY_FILE).read_text(encoding="utf-8"))
        sizes = {str(name): int(size) for name, size in content["files"].items()}
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
        created = datetime.fromisoformat(content["created"])
        used = datetime.fromtimestamp((folder / _ENTRY_FILE).stat().st_mtime, UTC)
        label = str(content["label"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return CacheEntry(kind, label, sum(sizes.values()), created, used, folder, complete=True)


def describe_remains(folder: Path, kind: Kind) -> CacheEntry:
    """Describe a folder that ``read_entry`` does not take, so that it is listed and cleared as well."""
    status = folder.stat()
    changed = datetime.fromtimestamp(status.st_mtime, UTC)
    size = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # a build may be renaming its files just now
            size += file.lstat().st_size if not file.is_dir() else 0
    return CacheEntry(kind, "(unfinished)", size, changed, changed, folder, complete=False)


def mark_used(folder: Path) -> None:
    """Note the time of use as the modification time of ``entry.json``; a read-only cache goes without."""
    with suppress(OSError):
        os.utime(folder / _ENTRY_FILE)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
