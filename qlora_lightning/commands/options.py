"""What commands have in common: the parser of a command's own options, and the files that they name for output."""

import argparse
import contextlib
import logging
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from qlora_lightning.support.console import quiet_loggers
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import write_whole


class ParagraphFormatter(argparse.HelpFormatter):
    """Fills paragraphs to the terminal's width; one with an indented line stays as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:  # where argparse's own formatters differ, too
        return "\n\n".join(
            textwrap.indent(part if "\n " in part else textwrap.fill(part, width - len(indent)), indent)
            for part in text.split("\n\n")
        )


class OptionParser(argparse.ArgumentParser):
    """The parser of a command, which raises a mistake in one sentence, without a page of usage.

    Args:
        command: behind ``qlora-lightning``.
        description: what it does.
        examples: shown at the end of the help.
        usage: if argparse's own would mislead.
    """

    def __init__(self, command: str, description: str, examples: str, usage: str | None = None) -> None:
        super().__init__(
            prog=f"qlora-lightning {command}",
            usage=usage,
            description=description,
            epilog=examples,
            formatter_class=ParagraphFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Reject what was typed."""
        raise UserError(f"{message}. See `{self.prog} --help`.")


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence what Lightning logs of devices, data and the end of a fit, for a command with a report of its own."""
    with quiet_loggers(logging.WARNING, "lightning.pytorch", "lightning.fabric"):
        yield


# ---- output ----------------------------------------------------------------------------------------------------------


def add_json_option(parser: argparse.ArgumentParser) -> None:
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
    if file.exists() and not file.is_file():  # a pipe, or a terminal
        return file
    if not os.access(file.parent, os.W_OK):
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


def write_output(file: Path, content: str | bytes | Mapping[str, Any]) -> None:
    """Write what a command has made, as :func:`~qlora_lightning.support.files.write_whole` does.

    Raises:
        UserError: the disk does not take it.
    """
    try:
        write_whole(file, content)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}.") from error
