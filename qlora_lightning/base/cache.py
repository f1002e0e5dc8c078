"""The user's cache: folders that are expensive to make, made once and found again by what they were made from."""

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qlora_lightning.base.cache_entry import Json, Kind, find_damage, mark_used, read_entry, seal_entry
from qlora_lightning.errors import UserError

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
            does, see :class:`~qlora_lightning.base.cache_entry.EntryCheck`.

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
