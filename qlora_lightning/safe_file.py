"""Files that are whole or not there: written beside, flushed to the disk, renamed."""

import errno
import os
import re
import shutil
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write a small text file so that a reader, and a machine that dies, leave the old or the new one, never half."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    put_in_place(unfinished, file)


def put_in_place(unfinished: Path, target: Path) -> None:
    """Flush a file that is written, and give it the name under which it counts; a file of that name stays until then.

    Raises:
        OSError: The disk fails, or is no longer there.
    """
    flush(unfinished)
    os.replace(unfinished, target)
    flush(target.parent)


def share(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system knows no hard links; the old target stays until then.

    Raises:
        OSError: The disk is full or fails.
    """
    beside = target.with_name(f"{target.name}.unfinished")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:
        shutil.copyfile(source, beside)
    put_in_place(beside, target)


def flush(path: Path) -> None:
    """Wait until the disk has what was written to a file, or the names that were changed in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network mounts may not flush a folder
            raise
    finally:
        os.close(descriptor)


def find_storage_fault(error: BaseException | None) -> str | None:
    """Say what the disk had against a write: `No space left on device`; nothing where an error is of another kind.

    torch hides it behind a RuntimeError of its own, and what is written in Rust (safetensors, tokenizers) says it in
    the text of the message only.
    """
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        found = re.search(r"([^:\n]+) \(os error \d+\)", str(error))
        if found:
            return found[1].strip()
        error = error.__cause__ or error.__context__
    return None
