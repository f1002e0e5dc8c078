"""Printed output: control characters of paths, rows and answers are shown, not sent to the terminal.

What a command or a callback tells its user is printed by :func:`say`, and by ``say_once`` of :mod:`.trainer` where
several processes run. What a reader of rows has found is logged by Lightning, as what Lightning itself says: a script
that uses only the data silences it as usual. Only JSON for another program, and what is printed before these libraries
are imported, goes by ``print``.
"""

import contextlib
import logging
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_JOINER = "\N{ZERO WIDTH JOINER}"  # part of emoji
_PICTURES = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\t": "⇥", "\x7f": "␡"}


def show_controls(text: str, keep: str = "\n") -> str:
    """Make invisible characters, and those that control a terminal, visible, except those in ``keep``."""
    if text.isprintable():
        return text
    return "".join(
        _PICTURES.get(char) or char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ("Cc", "Cf", "Cs") and char not in keep and char != _JOINER
        else char
        for char in text
    )


class VisibleRecord(logging.LogRecord):
    """A log record that shows control characters in its message."""

    def getMessage(self) -> str:
        return show_controls(super().getMessage())


class _VisibleConsole(Console):
    """Shows control characters in what it prints, except those that rich itself sends to the terminal."""

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        for segment in super().render(*args, **kwargs):
            yield segment if segment.control else Segment(show_controls(segment.text), segment.style)


def count_of(number: int, noun: str) -> str:
    """Return a count before its noun, which is given in the singular: ``1 row``, ``1,200 rows``."""
    plural = noun + ("es" if noun.endswith(("ch", "s")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def terminal(stderr: bool = False, record: bool = False) -> Console:
    """Return the console for all that is printed; strings in square brackets are markup unless they are escaped."""
    return _VisibleConsole(stderr=stderr, highlight=False, record=record)


def say(what: Any) -> None:
    """Print a line without markup, colors or added breaks, or a table of rich."""
    terminal().print(what, markup=False, soft_wrap=isinstance(what, str))


def make_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", box: bool = True, right: bool = True
) -> Table:
    """Return a table of plain texts, without markup; without headings it has no head.

    ``box`` draws lines around cells; ``right`` justifies all columns but the first to the right, as numbers.
    """
    table = Table(title=Text(title), title_justify="left", show_header=bool(headings))
    if not box:
        table.box, table.pad_edge, table.padding = None, False, (0, 2, 0, 0)
    for number, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if number and right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


@contextlib.contextmanager
def progress_counter(description: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of steps done; it moves a bar in a terminal, removed at the end."""
    console = terminal(stderr=True)
    with Progress(console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(escape(description), total=total)
        yield lambda steps: progress.advance(task, steps)


@contextlib.contextmanager
def quiet_loggers(level: int, *names: str) -> Iterator[None]:
    """Silence loggers below a level, and restore their levels on exit."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, old_level in levels.items():
            logging.getLogger(name).setLevel(old_level)
