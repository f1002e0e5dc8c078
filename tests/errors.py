"""How tests tell one error of a user from another: by its key, and by the facts that it names."""

import contextlib
from collections.abc import Iterator

import pytest

from qlora_lightning.support.errors import UserError


@contextlib.contextmanager
def rejects(key: str, *facts: str) -> Iterator["pytest.ExceptionInfo[UserError]"]:
    """Expect a ``UserError`` with this key, whose message names these facts: files, lines, keys, values."""
    with pytest.raises(UserError) as raised:
        yield raised
    message = str(raised.value)
    assert raised.value.key == key, message
    assert all(fact in message for fact in facts), message
