"""Lines for the user, as they are: paths and row texts may look like markup."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import rich

_is_brief = ContextVar("is_brief", default=False)


def say(line: str) -> None:
    """Print a line without markup, colours or breaks of our own."""
    rich.get_console().print(line, markup=False, highlight=False, soft_wrap=True)


def describe(what: Any) -> None:
    """Print what a run says of itself: its adapter, its memory; within :func:`brief` it says nothing of them."""
    if _is_brief.get():
        return
    if isinstance(what, str):
        say(what)
    else:
        rich.print(what)


@contextlib.contextmanager
def brief() -> Iterator[None]:
    """Leave out what a run says of itself, where one like it has just said the same."""
    token = _is_brief.set(True)
    try:
        yield
    finally:
        _is_brief.reset(token)
