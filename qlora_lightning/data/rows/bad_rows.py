"""Rows that cannot be used, and the checks of single values in them."""

import json
from typing import Any, NamedTuple

from qlora_lightning.support.errors import UserError


class RowFault(UserError):
    """One row cannot be used. The message is a short reason; the caller adds file and line."""


class BadRow(NamedTuple):
    """A rejected row: its file and line (``train.jsonl:17``) and the reason."""

    where: str
    reason: str


def kind_of(value: Any) -> str:
    """Return ``null``, or the name of the value's type."""
    return "null" if value is None else type(value).__name__


def read_string(value: Any, where: str) -> str:
    """Return a string, or raise a RowFault that begins with ``where``."""
    if not isinstance(value, str):
        raise RowFault(f"{where} must be a string, found {kind_of(value)}")
    return value


def parse_json(value: Any, where: str) -> Any:
    """Parse a JSON string, or raise a RowFault; return any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, or a number of 5,000 digits
        raise RowFault(f"{where}: not JSON ({error})") from error
