"""What kind of value was found, in the words of a message."""

from typing import Any


def kind_of(value: Any) -> str:
    """Return ``null``, ``an empty list``, or the name of the value's type."""
    if isinstance(value, list) and not value:
        return "an empty list"
    return "null" if value is None else type(value).__name__
