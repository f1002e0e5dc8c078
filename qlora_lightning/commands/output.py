"""Files that a command is asked to write: checked before a second is spent, written whole at the end."""

import contextlib
import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import write_whole


def add_json_option(parser: ArgumentParser) -> None:
    """Add ``--json FILE`` and ``--force``."""
    parser.add_argument("--json", metavar="FILE", help="write all figures there too; - is standard output")
    parser.add_argument("--force", action="store_true", help="overwrite a file that is there already")


def check_output(option: str, name: str | Path | None, force: bool = False) -> Path | None:
    """Return the file that an option names; ``-`` is standard output, None no file.

    Raises:
        UserError: it cannot be written, or exists and ``force`` is off.
    """
    if name is None:
        return None
    if str(name) == "-":
        return Path("/dev/stdout")
    file = Path(name).expanduser()
    if file.is_dir():
        raise UserError(f"{option} {file} is a folder; name a file.")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"{option} {file}: the folder {file.parent} does not exist or cannot be written to.")
    if file.is_file() and file.stat().st_size and not force:
        raise UserError(f"{option} {file} exists already. Name another file, or add --force to overwrite it.")
    return file


@contextlib.contextmanager
def tables_beside(file: Path | None) -> Iterator[None]:
    """Print to standard error while a file is standard output, so that it can be piped."""
    is_piped = file is not None and str(file) == "/dev/stdout"
    with contextlib.redirect_stdout(sys.stderr) if is_piped else contextlib.nullcontext():
        yield


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write figures for other programs to read.

    Raises:
        UserError: the disk does not take them.
    """
    # a config that is echoed may hold what YAML has beyond JSON, as a date
    write_output(file, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_output(file: Path, content: str | bytes) -> None:
    """Write what a command has made.

    Raises:
        UserError: the disk does not take it.
    """
    try:
        write_whole(file, content)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}.") from error
