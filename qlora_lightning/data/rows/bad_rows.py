"""Rows that cannot be used, and the checks of single values in them."""

import json
from typing import Any, NamedTuple

from qlora_lightning.support.errors import UserError


class RowFault(UserError):
    """One row cannot be used; the message is a short reason, to which the caller adds file and line."""


class BadRow(NamedTuple):
    """A row that was rejected: its place (``train.jsonl:17``) and why."""

    where: str
    reason: str


def kind_of(value: Any) -> str:
    """Return ``null``, or the name of the value's type."""
    return "null" if value is None else type(value).__name__


def read_string(value: Any, where: str) -> str:
    """Return a string, or raise a RowFault, of whose sentence ``where`` is the subject."""
    if not isinstance(value, str):
        raise RowFault(f"{where} must be a string, found {kind_of(value)}")
    return value


def parse_json(value: Any, where: str) -> Any:
    """Return what a JSON string holds, or raise a RowFault; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError, as a number of 5,000 digits is
        raise RowFault(f"{where}: not JSON ({error})") from error
