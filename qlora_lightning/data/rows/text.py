"""Strings of a row, without characters that no tokenizer encodes faithfully."""

from typing import Any

from qlora_lightning.data.reading.bad_rows import RowFault
from qlora_lightning.data.rows.kinds import kind_of

_MAX_DEPTH = 100  # far from Python's own limit, which the chat template would meet


def check_characters(value: Any, where: str, depth: int = 0) -> None:
    """Refuse a text, or a JSON value with any text in it, that holds a NUL or half a character.

    Args:
        value: the text or JSON value.
        where: the subject of the sentence.
        depth: how deep the value lies in another one.

    Raises:
        RowFault: if there is such a character, or the value is nested deeper than 100 levels.
    """
    if depth > _MAX_DEPTH:
        raise RowFault(f"{where} is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        check_characters([*value, *value.values()], where, depth)
    elif isinstance(value, list):
        for element in value:
            check_characters(element, where, depth + 1)
    elif isinstance(value, str):
        if "\x00" in value:
            raise RowFault(f"{where} contains a NUL character")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowFault(
                f"{where} contains half a character (a lone surrogate, as a cut \\ud83d escape leaves)"
            ) from None


def read_string(value: Any, where: str) -> str:
    """Return a string whose characters are checked.

    Raises:
        RowFault: if it is none, or holds such characters; ``where`` is the subject of the sentence.
    """
    if not isinstance(value, str):
        raise RowFault(f"{where} must be a string, found {kind_of(value)}")
    check_characters(value, where)
    return value
