"""Rows that cannot be used, and the checks of single values in them."""

import json
from typing import Any, NamedTuple

from qlora_lightning.data.rows.sources import Source
from qlora_lightning.support.errors import UserError

MAX_TEXT = 64_000_000  # characters of a row
TOO_MUCH_TEXT = "more than 64 MB of text, which no tokenizer should get at once: cut it into several rows"


class RowFault(UserError):
    """One row cannot be used. The message is a short reason; the caller adds file and line."""


class BadRow(NamedTuple):
    """A rejected row: its file and line (``train.jsonl:17``), the reason, and its source as in ``Row``."""

    where: str
    reason: str
    source: Source | None = None


def kind_of(value: Any) -> str:
    """Return ``null``, or the name of the value's type."""
    return "null" if value is None else type(value).__name__


def read_string(value: Any, where: str) -> str:
    """Return a string, or raise a RowFault that begins with ``where``."""
    if not isinstance(value, str):
        raise RowFault(f"{where} must be a string, found {kind_of(value)}")
    return value


def count_text(value: Any) -> int:
    """Count the characters of all texts in a value."""
    if isinstance(value, dict | list):
        return sum(map(count_text, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


def parse_json(value: Any, where: str) -> Any:
    """Parse a JSON string, or raise a RowFault; return any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, or a number of 5,000 digits
        raise RowFault(f"{where}: not JSON ({error})") from error
