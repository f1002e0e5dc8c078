"""What commands have in common: the parser of a command's own options, and the files that they name for output."""

import argparse
import contextlib
import functools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from qlora_lightning.support.console import quiet_loggers
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import write_whole

quiet_lightning = functools.partial(quiet_loggers, logging.WARNING, "lightning.pytorch", "lightning.fabric")
"""Silences logs of devices, data and the end of a fit, for a command with a report of its own."""


class OptionParser(argparse.ArgumentParser):
    """Parser of a command, which raises an error of one sentence, without a page of usage.

    With ``fit`` the command takes options of ``fit`` beside its own.
    """

    def __init__(self, command: str, description: str, examples: str, fit: bool = False) -> None:
        super().__init__(
            prog=f"qlora-lightning {command}",
            usage=f"qlora-lightning {command} [options] [options of fit]" if fit else None,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise the error as a UserError."""
        raise UserError(f"{message}. See `{self.prog} --help`.")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json FILE`` and ``--force``."""
    parser.add_argument("--json", metavar="FILE", help="also write all figures as JSON; - is standard output")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")


def expand_path(text: str) -> Path:
    """Return the path of an option with ``~`` expanded, which a shell leaves as it is in ``--out=~/DIR``."""
    return Path(text).expanduser()


def check_output(option: str, name: str | Path | None, force: bool = False) -> Path | None:
    """Return the file that an option names.

    Raises:
        UserError: it exists and ``force`` is off, or it is a folder.
    """
    if name is None:
        return None
    file = Path(name).expanduser()
    if file.is_dir():
        raise UserError(f"{option} {file} is a folder: name a file.")
    if file.is_file() and not force:
        raise UserError(f"{option} {file} exists already. Name another file, or add --force to overwrite it.")
    return file


@contextlib.contextmanager
def json_output(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a dictionary for figures, which are written to the file of ``--json`` at the end.

    If that is standard output, to be piped, everything else is printed to standard error.
    """
    figures: dict[str, Any] = {}
    if options.json == "-":
        with contextlib.redirect_stdout(sys.stderr):
            yield figures
        print(json.dumps(figures, indent=2, default=str))
        return
    file = check_output("--json", options.json, options.force)
    yield figures
    if file is not None:
        write_whole(file, figures)
