"""The cache: folders that are built once, checked, shared by processes, listed and cleared."""

import functools
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from filelock import FileLock, Timeout

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import flush, naming_file, write_whole

Json: TypeAlias = "str | int | float | bool | list[Json] | Mapping[str, Json] | None"
Kind: TypeAlias = Literal["unpacked", "quantized", "samples", "kernels", "checks"]

_ENTRY_FILE = "entry.json"
# Only names of the cache's own entries: QLORA_LIGHTNING_CACHE may be a folder that holds other things too.
_ENTRY_NAME = "[0-9a-f]" * 24
_log = logging.getLogger(__name__)


def cache_root(kind: Kind | None = None) -> Path:
    """Return the cache's folder: ``QLORA_LIGHTNING_CACHE``, else the user's ``.cache``. It may not exist yet.

    Compiled code is always in the user's own: a shared folder, or one from elsewhere, may hold only data.
    """
    folder = os.environ.get("QLORA_LIGHTNING_CACHE")
    if folder and kind != "kernels":
        return Path(folder).expanduser().absolute()
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(parent).expanduser().absolute() / "qlora_lightning"


def make_root(kind: Kind | None = None) -> None:
    """Make the cache's folder, for this user alone: its data is trained on, and its libraries are run."""
    cache_root(kind).mkdir(mode=0o700, parents=True, exist_ok=True)


def hash_key(key: Mapping[str, Json]) -> str:
    """Return the hash of a key: 24 hexadecimal digits, whatever the order of its items."""
    canonical = json.dumps(key, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]


def cached_folder(
    kind: Kind, key: Mapping[str, Json], build: Callable[[Path], None], label: str, check_weights: bool = True
) -> Path:
    """Return the complete folder for ``key``, building it if the cache does not hold it, in one process of several.

    An entry is complete once it has its ``entry.json``, which is written last. What a killed build leaves has none, and
    the next build removes it.

    Args:
        kind: the part of the cache, a folder below its root.
        key: everything that the content depends on, versions of libraries included.
        build: writes the content into an empty folder.
        label: for messages and ``qlora-lightning cache list``.
        check_weights: ``False`` does not compare the checksums of ``*.safetensors``.

    Raises:
        UserError: the cache cannot be written, or its disk is full.
    """
    folder = cache_root(kind) / kind / hash_key(key)
    if not _is_whole(folder, check_weights):
        try:
            make_root(kind)
            folder.parent.mkdir(exist_ok=True)
            with naming_file(folder), _lock(folder):
                if not _is_whole(folder, check_weights):  # else another process has built it meanwhile
                    _build_entry(folder, key, build, label)
        except OSError as error:
            if str(cache_root(kind)) not in str(error.filename):
                raise  # a file that the build reads
            raise UserError(
                f"The cache cannot keep {folder}: {error.strerror or error}. Set QLORA_LIGHTNING_CACHE to a folder "
                "with room that can be written, or make room with `qlora-lightning cache clear`.",
                "cache.full",
            ) from error
    with suppress(OSError):  # a read-only cache does not record its last use
        os.utime(folder / _ENTRY_FILE)
    return folder


@dataclass(frozen=True)
class CacheEntry:
    """What the cache holds under one path: an entry, or the files of a running or killed build."""

    kind: Kind
    label: str
    size_bytes: int
    last_used: datetime
    path: Path


def list_entries(kind: Kind | None = None) -> list[CacheEntry]:
    """Return the entries of one kind or of all, the last used first."""
    entries = [
        _describe(path, entry_kind)
        for entry_kind in (get_args(Kind) if kind is None else (kind,))
        for path in (cache_root(entry_kind) / entry_kind).glob(_ENTRY_NAME)
        if path.is_dir() and not path.is_symlink()
    ]
    return sorted(entries, key=lambda entry: entry.last_used, reverse=True)


def clear_entries(kind: Kind | None = None) -> list[CacheEntry]:
    """Remove the entries of one kind or of all, except those being built; return the removed ones.

    A running process that has mapped an entry into memory keeps its data. Symbolic links are never followed.
    """
    removed = []
    for entry in list_entries(kind):
        with suppress(Timeout), _lock(entry.path, timeout=0):
            shutil.rmtree(entry.path)
            removed.append(entry)
    if kind is None:
        shutil.rmtree(cache_root() / "fingerprints", ignore_errors=True)
    return removed


def _lock(folder: Path, timeout: float = -1) -> FileLock:
    return FileLock(folder.with_name(f"{folder.name}.lock"), timeout)


def _is_whole(folder: Path, check_weights: bool) -> bool:
    """Whether an entry is complete and matches its checksums."""
    try:
        for name, checksum in json.loads((folder / _ENTRY_FILE).read_text(encoding="utf-8"))["crc32"].items():
            file = folder / name
            is_checked = check_weights or file.suffix != ".safetensors"
            if is_checked and (not file.is_file() or _crc32(file, file.stat().st_mtime_ns) != checksum):
                return False
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # damaged, or of old
        return False
    return True


@functools.cache  # a process opens the same base several times, as for each trial of a sweep
def _crc32(file: Path, mtime_ns: int) -> int:
    """Return the CRC-32 of a file, read without a memory mapping, whose pages would count as resident."""
    checksum = 0
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(4 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _build_entry(folder: Path, key: Mapping[str, Json], build: Callable[[Path], None], label: str) -> None:
    """Build an entry under its own name, not by ``replacing_folder``: what a kill leaves is then listed and cleared."""
    if folder.exists():
        _log.warning("The cached %s is damaged or unfinished (%s): removed, and made again.", label, folder)
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        build(folder)
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        for file in files.values():
            flush(file)
        crc32 = {name: _crc32(file, file.stat().st_mtime_ns) for name, file in files.items()}
        write_whole(folder / _ENTRY_FILE, {"label": label, "key": key, "crc32": crc32})
    except BaseException:  # an interrupted build must not keep gigabytes either
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _describe(folder: Path, kind: Kind) -> CacheEntry:
    label, size, marker = "(unfinished)", 0, folder / _ENTRY_FILE
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        label = str(json.loads(marker.read_text("utf-8"))["label"])
    with suppress(OSError):  # a running build may be renaming files
        size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
    last_used = (marker if marker.exists() else folder).stat().st_mtime
    return CacheEntry(kind, label, size, datetime.fromtimestamp(last_used, UTC), folder)
