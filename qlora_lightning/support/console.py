"""Lines for the user, as they are: paths and row texts may look like markup."""

import contextlib
import logging
import os
import select
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import rich

_is_brief = ContextVar("is_brief", default=False)


def say(line: str) -> None:
    """Print a line without markup, colours or breaks of our own."""
    rich.get_console().print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def quiet_loggers(level: int, *names: str) -> Iterator[None]:
    """Silence loggers below a level, whatever level they had."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, own in before.items():
            logging.getLogger(name).setLevel(own)


def drop_lost_output() -> None:
    """Let output whose terminal or reader is gone lead nowhere: each write to it would raise an error."""
    if not hasattr(select, "poll"):  # Windows
        return
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if poll.poll(0):  # an error or a hangup: nothing else was asked for
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def print_detail(what: Any) -> None:
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
