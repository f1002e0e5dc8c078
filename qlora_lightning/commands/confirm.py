"""A question on the terminal before something is done that cannot be undone."""

import sys

from qlora_lightning.support.errors import UserError


def confirm(question: str, action: str) -> bool:
    """Ask for a yes; anything else is a no, Ctrl-D too.

    Args:
        question: What is asked.
        action: What asks, for the message where nobody can answer.

    Raises:
        UserError: There is no terminal.
    """
    if not sys.stdin.isatty():
        raise UserError(f"{action} asks for a yes, and there is no terminal to ask on. Add --yes.")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False
