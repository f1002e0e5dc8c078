"""One entry of the cache: a folder that is complete exactly when its ``entry.json`` says so, with checksums."""

import json
import os
import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from qlora_lightning.errors import UserError

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
