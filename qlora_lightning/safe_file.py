"""Files that are whole or not there: written beside, flushed to the disk, renamed."""

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
from pathlib import Path


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a small file so that a reader, and a machine that dies, leave the old or the new one, never half.

    A link is followed: the file that it leads to is replaced, and keeps its mode. What is no regular file (a pipe, a
    terminal, ``/dev/stdout``) cannot be replaced, and is written into.

    Raises:
        OSError: The disk is full or fails, or who reads the pipe has gone.
    """
    # a file name may hold bytes that are no UTF-8, which Python keeps as lone surrogates
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    stream = _find_stream(file)
    if stream is not None:
        with os.fdopen(stream, "wb") as opened:
            opened.write(data)
        return
    target = Path(os.path.realpath(file))
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        unfinished.write_bytes(data)
        if target.exists():
            shutil.copymode(target, unfinished)
        put_in_place(unfinished, target)
    except BaseException:  # Ctrl-C too
        unfinished.unlink(missing_ok=True)
        raise


def is_stream(file: Path) -> bool:
    """Whether a name leads to what is written into and not replaced: a pipe, a terminal, this process's own output."""
    return (file.exists() and not file.is_file() and not file.is_dir()) or _find_own_output(file) is not None


def find_stream_fault(file: Path) -> str | None:
    """Say what a name that leads to a stream is, where it is none to write into; nothing where it is.

    A named pipe is none: to wait for who reads it may be for ever, and to try whether somebody does would end him.
    """
    if _find_own_output(file) is not None:
        return None
    mode, place = file.stat().st_mode, Path(os.path.realpath(file))
    if stat.S_ISFIFO(mode) and place.exists() and place.parts[:2] != ("/", "dev"):
        return "a named pipe"
    if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
        return "a socket or a disk"
    return None


def set_usual_mode(file: Path) -> None:
    """Give a file the mode that the umask wants: safetensors lets nobody but its owner read what it writes."""
    mask = os.umask(0)  # which can only be read by setting it
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def put_in_place(unfinished: Path, target: Path) -> None:
    """Flush a file that is written, and give it the name under which it counts; a file of that name stays until then.

    Raises:
        OSError: The disk fails, or is no longer there.
    """
    flush(unfinished)
    os.replace(unfinished, target)
    flush(target.parent)


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


def _find_stream(file: Path) -> int | None:
    """Open what is no regular file for writing; of this process's own output, a second handle to the same place in it.

    Opened by its name, ``/dev/stdout`` that leads into a file would be written from its beginning again.
    """
    own = _find_own_output(file)
    if own is not None:
        for printed in (sys.stdout, sys.stderr):
            printed.flush()
        return os.dup(own)
    return os.open(file, os.O_WRONLY) if is_stream(file) else None


def _find_own_output(file: Path) -> int | None:
    """Give the descriptor of this process's output that a name leads to."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(file.stat(), os.fstat(descriptor)):
                return descriptor
    return None


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
