"""Files that a command is told to write (``--json FILE``): tried at the start, written whole at the end."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import is_stream, write_whole

_LARGEST = 256_000_000  # bytes; no command writes a larger JSON


def json_file(
    name: str | Path | None, keys: Sequence[str], inputs: Sequence[Path] = (), *, force: bool | None = None
) -> Path | None:
    """Check the file of ``--json``, see :func:`check_output_file`.

    Args:
        name: Of the file, ``-`` for standard output; ``None`` where the option was not given.
        keys: What every JSON of the command holds, so that an earlier one is known, and may be replaced.
        inputs: Files that the command reads.
        force: Whether any other file may be replaced; ``None`` where the command has no ``--force``.
    """
    if name is None:
        return None
    return check_output_file("--json", name, lambda file: _holds(file, keys), inputs, force=force)


def check_output_file(
    option: str,
    name: str | Path,
    is_own: Callable[[Path], bool],
    inputs: Sequence[Path] = (),
    *,
    force: bool | None = None,
) -> Path:
    """Try, before a second is spent, whether a file can be written; nothing is left of the trial.

    Args:
        option: That names it, for the message.
        name: Of the file. A link is followed; a pipe, a terminal or ``/dev/stdout`` will do.
        is_own: Whether a file that is there is what the command writes itself, and may be replaced.
        inputs: Files that the command reads, see :func:`qlora_lightning.commands.input_files.find_inputs`.
        force: Whether any file may be replaced that the command does not read; ``None``: it has no ``--force``.

    Raises:
        UserError: There is no such folder, it is a folder, cannot be written, or something would be lost.
    """
    file = name_file(option, name)
    try:
        if file.is_dir():
            raise UserError(f"{option} {file}: that is a folder; name a file.")
        if is_stream(file):
            return file
        target = Path(os.path.realpath(file))
        if not target.parent.is_dir():
            raise UserError(
                f"{option} {file}: there is no folder {target.parent if file.is_symlink() else file.parent}."
            )
        if target.exists() and not os.access(target, os.W_OK):
            raise UserError(f"{option} {file}: the file is write-protected. Name another.")
        _try(target.parent)
        check_not_read(option, file, inputs)
        if not force and target.exists() and target.stat().st_size and not is_own(target):
            remedy = "Name another." if force is None else "Name another, or add --force."
            raise UserError(f"{option} {file}: that file is there, and was not written by this command. {remedy}")
    except OSError as error:
        raise UserError(f"{option} {file}: no file can be written there ({error.strerror}).") from error
    return file


def name_file(option: str, name: str | Path) -> Path:
    """Give the file that an option names; ``-`` is standard output.

    Raises:
        UserError: The option is empty.
    """
    if not str(name).strip():
        raise UserError(f"{option} is empty: name a file.")
    return Path("/dev/stdout" if str(name) == "-" else name)


def check_not_read(option: str, file: Path, inputs: Sequence[Path]) -> None:
    """Refuse to write over a file that the command reads.

    Raises:
        UserError: It is one.
    """
    if file.exists() and any(each.exists() and file.samefile(each) for each in inputs):
        raise UserError(f"{option} {file}: this command reads that file. Name another.")


def check_output_folder(option: str, name: str | Path, *, made_beside: bool = False) -> Path:
    """Try whether a folder can be made, or can be written into where it is there; nothing is left of the trial.

    Args:
        option: That names it, for the message.
        name: Of the folder.
        made_beside: It is made under another name beside, also where it is there.

    Raises:
        UserError: It cannot, or is a file.
    """
    folder = Path(name)
    try:
        place = Path(os.path.realpath(folder))
        place = place.parent if made_beside else place
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise UserError(f"{option} {folder}: {place} is a file; name a folder.")
        _try(place)
    except OSError as error:
        raise UserError(f"{option} {folder}: nothing can be written there ({error.strerror}).") from error
    return folder


def check_distinct(named: Mapping[str, Path | None]) -> None:
    """Refuse one file under two options, of which one would be lost.

    Args:
        named: Files by option; ``None`` where an option was not given.

    Raises:
        UserError: Two are the same.
    """
    seen: dict[str, str] = {}
    for option, file in named.items():
        if file is None or is_stream(file):
            continue
        other = seen.setdefault(os.path.realpath(file), option)
        if other != option:
            raise UserError(f"{other} and {option} both name {file}: name two files.")


@contextlib.contextmanager
def tables_beside(*files: Path | None) -> Iterator[None]:
    """Let what is printed go to standard error where a file is standard output, so that it can be piped."""
    if not any(file is not None and _is_standard_output(file) for file in files):
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _is_standard_output(file: Path) -> bool:
    with contextlib.suppress(OSError):
        output = os.fstat(1)
        return os.path.samestat(file.stat(), output) and not os.path.samestat(os.stat(os.devnull), output)
    return False


def _holds(file: Path, keys: Sequence[str]) -> bool:
    """Whether a file is a JSON object with all of some keys."""
    if file.stat().st_size > _LARGEST:
        return False
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and all(key in content for key in keys)


def _try(folder: Path) -> None:
    """Make a file in a folder, and remove it: rights alone do not tell of a disk that is full or read-only."""
    with tempfile.NamedTemporaryFile(dir=folder):
        pass


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write figures for other programs to read.

    Raises:
        UserError: The disk does not take them.
    """
    # a config that is echoed may hold what YAML has beyond JSON, as a date
    write_output(file, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_output(file: Path, content: str | bytes) -> None:
    """Write what a command has made.

    Raises:
        UserError: The disk does not take it.
    """
    try:
        write_whole(file, content)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}.") from error
