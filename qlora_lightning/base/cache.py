"""The cache: folders that are made once, checked, shared by processes, listed and cleared."""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from filelock import FileLock, Timeout

from qlora_lightning.support.errors import UserError

Json: TypeAlias = "str | int | float | bool | list[Json] | Mapping[str, Json] | None"
Kind: TypeAlias = Literal["unpacked", "quantized", "samples", "kernels"]

_ENTRY_FILE = "entry.json"
_CHUNK_BYTES = 4 << 20


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
    has_checksums: bool = True  # an entry of an earlier version has none


def seal_entry(folder: Path, label: str, key: Mapping[str, Json]) -> None:
    """Flush every file of ``folder`` to the disk, then write the ``entry.json`` that makes it complete.

    Raises:
        OSError: the disk is full or fails.
    """
    sizes: dict[str, int] = {}
    sums: dict[str, int] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        _flush(file)
        name = file.relative_to(folder).as_posix()
        sizes[name], sums[name] = file.stat().st_size, _sum_up(file)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"label": label, "created": created, "key": key, "files": sizes, "crc32": sums}
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
        label, summed = str(content["label"]), "crc32" in content
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return CacheEntry(kind, label, sum(sizes.values()), created, used, folder, complete=True, has_checksums=summed)


def find_damage(folder: Path, *, weights: bool = True) -> str | None:
    """Return the name of a file that does not match the checksum of its entry; None if all do.

    An entry without checksums, of an earlier version, and a folder outside the cache match.

    Args:
        folder: of the entry.
        weights: whether to read ``*.safetensors`` too, which may be gigabytes.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        sums = json.loads((folder / _ENTRY_FILE).read_text(encoding="utf-8")).get("crc32", {})
    except FileNotFoundError:
        return None
    checked = (name for name in sums if weights or not name.endswith(".safetensors"))
    return next((name for name in checked if _sum_up(folder / name) != sums[name]), None)


class EntryCheck:
    """Compares an entry with its checksums in a thread: a base of 8B parameters takes some seconds to read.

    Args:
        folder: of the entry.
        label: what it is, for the message.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self._folder, self._label = folder, label
        self._damaged: Future[str | None] = Future()
        threading.Thread(target=self._check, daemon=True, name="cache-check").start()

    def _check(self) -> None:
        try:
            name = find_damage(self._folder)
            self._damaged.set_result(None if name is None else f"{self._folder / name} does not match its checksum")
        except Exception as error:  # as of a bad sector
            self._damaged.set_result(f"{self._folder} cannot be read ({error})")

    @property
    def is_done(self) -> bool:
        """Whether the result is known."""
        return self._damaged.done()

    def wait(self) -> None:
        """Wait for the result.

        Raises:
            UserError: the entry is damaged. It no longer counts: the next start makes it again.
        """
        fault = self._damaged.result()
        if fault is not None:
            damage = f"The cached {self._label} is damaged: {fault}. Nothing that was computed with it is saved."
            try:
                (self._folder / _ENTRY_FILE).unlink(missing_ok=True)
            except OSError as error:
                raise UserError(
                    f"{damage} The cache cannot be written ({error.strerror}): remove {self._folder} where it can be, "
                    "or set QLORA_LIGHTNING_CACHE to a folder that can be written."
                ) from error
            raise UserError(
                f"{damage} Start again with the same command: the entry is made again. If this comes back, check the "
                "disk and the memory."
            )


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


def _sum_up(file: Path) -> int:
    """Return the CRC-32 of a file: read, not mapped, so that its pages do not count as resident."""
    total, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            total = zlib.crc32(buffer[:count], total)
    return total


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_log = logging.getLogger(__name__)

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_root() -> Path:
    """Return the cache's folder: ``QLORA_LIGHTNING_CACHE``, else the user's ``.cache``. It may not exist yet."""
    if chosen := os.environ.get("QLORA_LIGHTNING_CACHE"):
        return Path(chosen).expanduser().absolute()
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(parent).expanduser().absolute() / "qlora_lightning"


def hash_key(key: Mapping[str, Json]) -> str:
    """Name a key: 24 hexadecimal digits, the same whatever the order of its items."""
    canonical = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]


def cached_folder(
    kind: Kind,
    key: Mapping[str, Json],
    build: Callable[[Path], None],
    label: str,
    checked_bytes: int | None = None,
) -> Path:
    """Return the complete folder for ``key``, building it where the cache does not hold it.

    Several processes that ask at once build once: the others wait. A folder under the returned path is always
    complete, since it is built beside and renamed; a killed build leaves only a hidden folder, which the next
    build removes.

    Args:
        kind: the part of the cache, a folder below its root.
        key: everything that the content depends on, versions of libraries included.
        build: writes the content into the empty folder that it is given.
        label: what the content is, for messages and ``qlora-lightning cache list``.
        checked_bytes: the weights of a larger entry are not compared with their checksums here: whoever reads them
            does, see :class:`EntryCheck`.

    Raises:
        UserError: the cache cannot be written, or its disk is full.
    """
    folder = cache_root() / kind / hash_key(key)
    if not is_whole(folder, kind, checked_bytes):
        with _explain_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = _acquire_lock(folder, label)
        try:
            if not is_whole(folder, kind, checked_bytes):  # else the process that we waited for has built it
                with _explain_errors(folder):
                    _remove_remains(folder, label)
                _build_entry(folder, key, build, label)
        finally:
            lock.release()
    mark_used(folder)
    return folder


def is_whole(folder: Path, kind: Kind, checked_bytes: int | None = None) -> bool:
    """Whether an entry is complete and matches its checksums; ``checked_bytes`` as in :func:`cached_folder`.

    An entry without checksums, of an earlier version, counts only in a cache that cannot be written.
    """
    entry = read_entry(folder, kind)
    if entry is None:
        return False
    if not entry.has_checksums:
        return not os.access(folder.parent, os.W_OK)
    try:
        return find_damage(folder, weights=checked_bytes is None or entry.size_bytes <= checked_bytes) is None
    except OSError:  # as of a bad sector
        return False


def lock_path(folder: Path) -> Path:
    """Return the lock file of an entry's folder; whoever builds or removes the entry holds it."""
    return folder.with_name(f"{folder.name}.lock")


def _acquire_lock(folder: Path, label: str) -> FileLock:
    lock = FileLock(lock_path(folder))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        _log.info("Another process is making %s in the cache; waiting for it (%s).", label, folder)
        lock.acquire(timeout=-1)
    return lock


def _remove_remains(folder: Path, label: str) -> None:
    """Remove what a killed build or a damaged entry left. The lock is held, so nobody is writing it."""
    if folder.exists():
        _log.warning("The cached %s is damaged or has no checksums (%s): removed, and made again.", label, folder)
        shutil.rmtree(folder)
    for partial in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(partial)


def _build_entry(folder: Path, key: Mapping[str, Json], build: Callable[[Path], None], label: str) -> None:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with _explain_errors(folder):
            partial.mkdir()
        with _explain_errors(folder, only_full=True):
            build(partial)
        with _explain_errors(folder):
            seal_entry(partial, label, key)
            partial.rename(folder)
    except BaseException:  # an interrupted build as well must not keep gigabytes
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _explain_errors(folder: Path, *, only_full: bool = False) -> Iterator[None]:
    """Word the file system's errors for the user; with ``only_full``, leave those that are not about space alone."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # safetensors writes in Rust and words the operating system's error in an exception class of its own.
        full = getattr(error, "errno", None) in _DISK_FULL or "No space left on device" in str(error)
        if not full and (only_full or not isinstance(error, OSError)):
            raise
        reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        # An unpacked GGUF has no other place: only quantized bases can go without the cache.
        without = " or set model.cache: false," if folder.parent.name == "quantized" else ""
        problem, advice = f"The cache cannot keep {folder}", "Set"
        if folder.exists():
            problem = f"The cached {folder} is damaged or has no checksums, and cannot be made again"
            advice = "Remove it where the cache can be written, or set"
        raise UserError(
            f"{problem}: {reason}. {advice} QLORA_LIGHTNING_CACHE to a folder with room that can be written,{without} "
            "or make room with `qlora-lightning cache clear`."
        ) from error


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
