"""argparse for commands with a few options of their own: mistakes in one sentence, help as wide as the terminal."""

import argparse
import re
import textwrap
from typing import Any, NoReturn

from qlora_lightning.support.errors import UserError

_BRACKETS = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]")
_NO_BREAK = "\N{NO-BREAK SPACE}"


class SentenceParser(argparse.ArgumentParser):
    """argparse whose mistakes are a sentence of ours, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse what was typed.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{message}. See `{self.prog} --help`.")


class ParagraphFormatter(argparse.HelpFormatter):
    """Fills usage and description to the terminal's width; a paragraph with an indented line stays as it is."""

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        if usage is not None and usage is not argparse.SUPPRESS:
            whole = _BRACKETS.sub(lambda option: option[0].replace(" ", _NO_BREAK), usage)
            margin = len("usage: ") * " "
            filled = textwrap.indent(textwrap.fill(whole, self._width - len(margin), break_on_hyphens=False), margin)
            usage = filled.strip().replace(_NO_BREAK, " ")
        super().add_usage(usage, actions, groups, prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:  # where argparse's own formatters differ, too
        return "\n\n".join(
            textwrap.indent(part if "\n " in part else textwrap.fill(part, width - len(indent)), indent)
            for part in text.split("\n\n")
        )


class OptionParser(SentenceParser):
    """The parser of a command.

    Args:
        command: Behind ``qlora-lightning``.
        description: What it does.
        examples: Shown at the end of the help.
        usage: Where argparse's own would mislead.
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
