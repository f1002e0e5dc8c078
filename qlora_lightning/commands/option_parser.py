"""argparse for commands with a few options of their own: mistakes in one sentence."""

import argparse
from typing import NoReturn

from qlora_lightning.errors import UserError


class SentenceParser(argparse.ArgumentParser):
    """argparse whose mistakes are a sentence of ours, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse what was typed.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{message}. See `{self.prog} --help`.")


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
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
