"""The cache: folders that are made once, checked, shared by processes, listed and cleared.

Locks are those of filelock: they work on every system, and the system frees them when their owner dies.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from filelock import FileLock, Timeout

from qlora_lightning.base.tensors import format_bytes
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import find_storage_fault, flush, write_whole

Json: TypeAlias = "str | int | float | bool | list[Json] | Mapping[str, Json] | None"
Kind: TypeAlias = Literal["unpacked", "quantized", "samples", "kernels"]

_ENTRY_FILE = "entry.json"
_CHUNK_BYTES = 4 << 20
_TAKES_SECONDS = 1_000_000_000  # bytes: what is read of a larger entry is announced
_DISK_FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
# Only names that the cache itself gives: QLORA_LIGHTNING_CACHE may point to a folder that holds other things too.
_ENTRY_NAME = "[0-9a-f]" * 24
_log = logging.getLogger(__name__)


def cache_root() -> Path:
    """Return the cache's folder: ``QLORA_LIGHTNING_CACHE``, else the user's ``.cache``. It may not exist yet."""
    if chosen := os.environ.get("QLORA_LIGHTNING_CACHE"):
        return Path(chosen).expanduser().absolute()
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(parent).expanduser().absolute() / "qlora_lightning"


def make_root() -> None:
    """Make the cache's folder, for this user alone: what is read from it is trained on, and libraries in it run."""
    root = cache_root()
    root.parent.mkdir(parents=True, exist_ok=True)
    root.mkdir(mode=0o700, exist_ok=True)


def hash_key(key: Mapping[str, Json]) -> str:
    """Name a key: 24 hexadecimal digits, the same whatever the order of its items."""
    canonical = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]


def cached_folder(
    kind: Kind, key: Mapping[str, Json], build: Callable[[Path], None], label: str, check_weights: bool = True
) -> Path:
    """Return the complete folder for ``key``, building it if the cache does not hold it.

    Processes that ask at once build once: the others wait. An entry counts as soon as it has its ``entry.json``, which
    is written last. What a killed build leaves has none, and is removed by the next build.

    Args:
        kind: the part of the cache, a folder below its root.
        key: everything that the content depends on, versions of libraries included.
        build: writes the content into the empty folder that it is given.
        label: what the content is, for messages and ``qlora-lightning cache list``.
        check_weights: see :func:`find_entry`.

    Raises:
        UserError: the cache cannot be written, or its disk is full.
    """
    folder = cache_root() / kind / hash_key(key)
    if find_entry(kind, key, check_weights) is None:
        with _explained(folder), _locked(folder, label):
            if find_entry(kind, key, check_weights) is None:  # else the process that we waited for has built it
                _build_entry(folder, key, build, label)
    with suppress(OSError):  # a read-only cache does not note when it was used
        os.utime(folder / _ENTRY_FILE)
    return folder


def find_entry(kind: Kind, key: Mapping[str, Json], check_weights: bool = True) -> Path | None:
    """Return the folder for ``key`` if it is complete and matches its checksums.

    The checksums of ``*.safetensors`` are left out unless ``check_weights``: an entry of which only other files are
    needed is found at once.
    """
    folder = cache_root() / kind / hash_key(key)
    content = _read_entry(folder)
    if content is None:
        return None
    try:
        return None if _find_damage(folder, content, check_weights) else folder
    except OSError:  # as of a bad sector
        return None


def check_entry(folder: Path) -> None:
    """Compare a folder with its checksums before its weights are read, if it is an entry of the cache.

    Raises:
        UserError: the entry is damaged. It no longer counts: the next start makes it again.
    """
    content = _read_entry(folder)
    if content is None:
        return
    name = _find_damage(folder, content)
    if name is not None:
        with suppress(OSError):
            (folder / _ENTRY_FILE).unlink()
        raise UserError(
            f"The cached {content['label']} is damaged: {folder / name} does not match its checksum. Start again: the "
            "entry is then made again. If this comes back, check the disk and the memory."
        )


@dataclass(frozen=True)
class CacheEntry:
    """What the cache holds under one path: an entry, or what a build has written that is running or was killed."""

    kind: Kind
    label: str
    size_bytes: int
    created: datetime
    last_used: datetime
    path: Path


def list_entries(kind: Kind | None = None) -> list[CacheEntry]:
    """Return what the cache holds, of one kind or of all, unfinished builds included, the last used first."""
    entries = [
        _describe(path, each)
        for each in _kinds(kind)
        for path in (cache_root() / each).glob(_ENTRY_NAME)
        if path.is_dir() and not path.is_symlink()
    ]
    return sorted(entries, key=lambda entry: entry.last_used, reverse=True)


def clear_entries(kind: Kind | None = None) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """Remove what the cache holds, of one kind or of all, with locks and remains.

    A running process that has mapped an entry into memory keeps its data. Symbolic links are never followed.

    Returns:
        What was removed, and what was left because a process is building it.
    """
    removed: list[CacheEntry] = []
    busy: list[CacheEntry] = []
    for entry in list_entries(kind):
        try:
            with FileLock(_lock_path(entry.path), timeout=0):
                shutil.rmtree(entry.path)
            removed.append(entry)
        except Timeout:
            busy.append(entry)
    for each in _kinds(kind):
        for file in (cache_root() / each).glob(f"{_ENTRY_NAME}.lock"):
            # Who waits for this lock looks, once he holds it, whether its file is still there, and else starts over.
            with suppress(Timeout), FileLock(file, timeout=0):
                file.unlink()
    if kind is None:
        for file in (cache_root() / "fingerprints").glob("*.json"):
            file.unlink()
    return removed, busy


def _kinds(kind: Kind | None) -> tuple[Kind, ...]:
    return get_args(Kind) if kind is None else (kind,)


def _read_entry(folder: Path) -> dict[str, Any] | None:
    """Read the ``entry.json`` of ``folder``; None if it is missing, or a file is not as long as it says."""
    try:
        content: dict[str, Any] = json.loads((folder / _ENTRY_FILE).read_text(encoding="utf-8"))
        is_whole = all((folder / name).stat().st_size == size for name, size in content["files"].items())
        return content if is_whole and "crc32" in content else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _find_damage(folder: Path, content: Mapping[str, Any], check_weights: bool = True) -> str | None:
    """Return the first file of an entry that does not match its checksum."""
    names = [name for name in content["crc32"] if check_weights or not name.endswith(".safetensors")]
    times = tuple((folder / name).stat().st_mtime_ns for name in names)
    return _find_damage_as_of(folder, content["label"], tuple((name, content["crc32"][name]) for name in names), times)


@functools.cache  # a process opens the same base several times, as for each trial of a sweep
def _find_damage_as_of(
    folder: Path, label: str, checksums: tuple[tuple[str, int], ...], times: tuple[int, ...]
) -> str | None:
    size = sum((folder / name).stat().st_size for name, _ in checksums)
    if size > _TAKES_SECONDS:
        _log.info("Checking the cached %s (%s).", label, format_bytes(size))
    return next((name for name, checksum in checksums if _crc32(folder / name) != checksum), None)


def _crc32(file: Path) -> int:
    """Read a file, without mapping it: its pages would count as resident."""
    total = 0
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            total = zlib.crc32(chunk, total)
    return total


def _build_entry(folder: Path, key: Mapping[str, Json], build: Callable[[Path], None], label: str) -> None:
    if folder.exists():
        _log.warning("The cached %s is damaged or unfinished (%s): removed, and made again.", label, folder)
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        build(folder)
        _seal(folder, label, key)
    except BaseException:  # an interrupted build as well must not keep gigabytes
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _seal(folder: Path, label: str, key: Mapping[str, Json]) -> None:
    """Flush every file of ``folder`` to the disk, then write the ``entry.json`` by which it counts."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    for file in files.values():
        flush(file)
    content = {
        "label": label,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "key": key,
        "files": {name: file.stat().st_size for name, file in files.items()},
        "crc32": {name: _crc32(file) for name, file in files.items()},
    }
    write_whole(folder / _ENTRY_FILE, content)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


@contextmanager
def _locked(folder: Path, label: str) -> Iterator[None]:
    make_root()
    folder.parent.mkdir(exist_ok=True)
    lock = FileLock(_lock_path(folder))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        _log.info("Another process is making %s in the cache; waiting for it (%s).", label, folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Report why the disk rejects a write to the cache; a build's other errors are its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        fault = find_storage_fault(error)
        is_ours = str(cache_root()) in str(getattr(error, "filename", None))
        if fault is None or (fault not in _DISK_FULL and not is_ours):
            raise
        raise UserError(
            f"The cache cannot keep {folder}: {fault}. Set QLORA_LIGHTNING_CACHE to a folder with room that can be "
            "written, or make room with `qlora-lightning cache clear`."
        ) from error


def _describe(folder: Path, kind: Kind) -> CacheEntry:
    content = _read_entry(folder)
    if content is not None:
        size, created = sum(content["files"].values()), datetime.fromisoformat(content["created"])
        return CacheEntry(kind, content["label"], size, created, _changed(folder / _ENTRY_FILE), folder)
    size = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # a build may be renaming its files just now
            size += file.lstat().st_size if not file.is_dir() else 0
    return CacheEntry(kind, "(unfinished)", size, _changed(folder), _changed(folder), folder)


def _changed(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)
