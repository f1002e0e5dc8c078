"""Files that a command is told to write (``--json FILE``): tried at the start, written whole at the end."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_lightning.errors import UserError
from qlora_lightning.safe_file import is_stream, write_whole


def json_file(name: str | Path | None) -> Path | None:
    """Check the file of ``--json``, see :func:`check_output_file`."""
    return None if name is None else check_output_file("--json", name)


def check_output_file(option: str, name: str | Path) -> Path:
    """Try, before a second is spent, whether a file can be written; nothing is left of the trial.

    Args:
        option: That names it, for the message.
        name: Of the file. A link is followed; a pipe or ``/dev/stdout`` will do.

    Raises:
        UserError: There is no such folder, it is a folder, or it cannot be written.
    """
    file = Path(name)
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
    except OSError as error:
        raise UserError(f"{option} {file}: no file can be written there ({error.strerror}).") from error
    return file


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


def _try(folder: Path) -> None:
    """Make a file in a folder, and remove it: rights alone do not tell of a disk that is full or read-only."""
    with tempfile.NamedTemporaryFile(dir=folder):
        pass


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write figures for other programs to read.

    Raises:
        UserError: The disk does not take them.
    """
    write_output(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_output(file: Path, content: str | bytes) -> None:
    """Write what a command has made.

    Raises:
        UserError: The disk does not take it.
    """
    try:
        write_whole(file, content)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}.") from error
