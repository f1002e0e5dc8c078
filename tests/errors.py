"""Errors of users, told apart by their keys and the facts that they name; and that of a machine that fails."""

import contextlib
from collections.abc import Iterator

import pytest

from qlora_lightning.support.errors import UserError


class MachineFailed(BaseException):
    """Not an Exception: nobody between who raises it and the test may handle it."""


@contextlib.contextmanager
def rejects(key: str, *facts: str) -> Iterator["pytest.ExceptionInfo[UserError]"]:
    """Expect a ``UserError`` with this key, whose message names these facts: files, lines, keys, values."""
    with pytest.raises(UserError) as raised:
        yield raised
    message = str(raised.value)
    assert raised.value.key == key, message
    assert all(fact in message for fact in facts), message
