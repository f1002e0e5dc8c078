"""What commands with a few options of their own share: an argparse parser, a question, quiet libraries."""

import argparse
import logging
import sys
import textwrap
from contextlib import AbstractContextManager
from typing import NoReturn

from qlora_lightning.support.console import quiet_loggers
from qlora_lightning.support.errors import UserError


class ParagraphFormatter(argparse.HelpFormatter):
    """Fills paragraphs to the terminal's width; one with an indented line stays as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:  # where argparse's own formatters differ, too
        return "\n\n".join(
            textwrap.indent(part if "\n " in part else textwrap.fill(part, width - len(indent)), indent)
            for part in text.split("\n\n")
        )


class SentenceParser(argparse.ArgumentParser):
    """argparse that raises a mistake in one sentence, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Reject what was typed.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}. See `{self.prog} --help`.")


class OptionParser(SentenceParser):
    """The parser of a command.

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


def confirm(question: str, action: str) -> bool:
    """Ask on the terminal for a yes; anything else is a no, Ctrl-D too.

    Raises:
        UserError: there is no terminal.
    """
    if not sys.stdin.isatty():
        raise UserError(f"{action} asks for a yes, and there is no terminal to ask on. Add --yes.")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def quiet_lightning() -> AbstractContextManager[None]:
    """Silence what Lightning logs of devices, data and the end of a fit, for a command with a report of its own."""
    return quiet_loggers(logging.WARNING, "lightning.pytorch", "lightning.fabric")
