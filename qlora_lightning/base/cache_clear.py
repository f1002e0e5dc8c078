"""Upkeep of the cache: what it holds, and removing it."""

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from filelock import FileLock, Timeout

from qlora_lightning.base.cache import cache_root, lock_path
from qlora_lightning.base.cache_entry import CacheEntry, Kind, describe_remains, read_entry
from qlora_lightning.errors import UserError

# Only names that the cache itself gives: QLORA_LIGHTNING_CACHE may point to a folder that holds other things too.
_ENTRY_NAME = re.compile(r"\.?([0-9a-f]{24})(\.\d+\.[0-9a-f]+)?")
_LOCK_NAME = re.compile(r"([0-9a-f]{24})\.lock")


@dataclass(frozen=True)
class ClearReport:
    """What ``clear_entries`` removed, and what it left because a process is building it now."""

    removed: list[CacheEntry]
    busy: list[CacheEntry]

    @property
    def freed_bytes(self) -> int:
        """The bytes of the files that are gone."""
        return sum(entry.size_bytes for entry in self.removed)


def list_entries(kind: Kind | None = None) -> list[CacheEntry]:
    """Return what the cache holds, of one kind or of all, unfinished builds included, the last used first."""
    kinds: tuple[Kind, ...] = get_args(Kind) if kind is None else (kind,)
    entries = [
        read_entry(folder, each) or describe_remains(folder, each) for each in kinds for folder in _entry_folders(each)
    ]
    return sorted(entries, key=lambda entry: entry.last_used, reverse=True)


def clear_entries(kind: Kind | None = None) -> ClearReport:
    """Remove what the cache holds, of one kind or of all, with locks and remains; builds that go on are left alone.

    A running process that has mapped an entry into memory keeps its data. Symbolic links are never followed.

    Raises:
        UserError: something cannot be removed.
    """
    removed: list[CacheEntry] = []
    busy: list[CacheEntry] = []
    try:
        for entry in list_entries(kind):
            (removed if _remove_entry(entry.path) else busy).append(entry)
        for each in get_args(Kind) if kind is None else (kind,):
            _remove_idle_locks(each)
        if kind is None:
            for file in _real_children(cache_root() / "fingerprints"):
                if file.suffix == ".json" and not file.is_dir():
                    file.unlink()
    except OSError as error:
        raise UserError(
            f"The cache could not be cleared: {error.filename}: {error.strerror}. Remove it by hand, or point "
            "QLORA_LIGHTNING_CACHE to a folder of your own."
        ) from error
    return ClearReport(removed, busy)


def _entry_folders(kind: Kind) -> Iterator[Path]:
    for path in _real_children(cache_root() / kind):
        if path.is_dir() and _ENTRY_NAME.fullmatch(path.name):
            yield path


def _real_children(folder: Path) -> list[Path]:
    """Return what lies in ``folder``, symbolic links left out: they may lead out of the cache."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.is_symlink())


def _remove_entry(path: Path) -> bool:
    """Remove one folder under its entry's lock; False where a process holds the lock."""
    match = _ENTRY_NAME.fullmatch(path.name)
    assert match is not None
    lock_file = lock_path(path.with_name(match.group(1)))
    try:
        with FileLock(lock_file, timeout=0):
            if path.name == match.group(1):
                # Renamed first, so that no process finds an entry of which half is gone.
                path = path.rename(path.with_name(f".{path.name}.0.0"))
            shutil.rmtree(path)
    except Timeout:
        return False
    return True


def _remove_idle_locks(kind: Kind) -> None:
    for path in _real_children(cache_root() / kind):
        # filelock looks, once it holds a lock, whether the file still has its name, and else starts over: removing
        # a lock file that we hold cannot let two builds in.
        if _LOCK_NAME.fullmatch(path.name):
            with suppress(Timeout), FileLock(path, timeout=0):
                path.unlink()
