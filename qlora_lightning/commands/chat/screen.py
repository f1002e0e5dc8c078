"""What a conversation looks like: colours and columns on a terminal, plain lines elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

Write = Callable[[str], object]


class Screen:
    """Shows answers while they are made.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def read(self) -> str | None:
        """Read the user's next line; ``None`` at the end. Piped lines are shown, so that a log can be read."""
        if sys.stdin.isatty():
            with contextlib.suppress(EOFError):
                return input("> ")
            self.console.print()
            return None
        line = sys.stdin.readline()
        if not line:
            return None
        self.tell(f"> {line.rstrip()}")
        return line

    def tell(self, text: str) -> None:
        """Say something that is no answer."""
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def one(self, name: str | None) -> Iterator[Write]:
        """Give what writes one answer, after the name of who speaks."""
        if name is not None:
            self.console.print(f"{name}: ", style="bold", end="", markup=False, highlight=False)
        yield self._write
        self.console.print()

    @contextlib.contextmanager
    def several(self, names: Sequence[str]) -> Iterator[Callable[[str], Write]]:
        """Give what makes a writer for each of several who answer the same: side by side on a terminal."""
        if not self.console.is_terminal:
            yield self._section
            self.console.print()
            return
        texts = {name: "" for name in names}
        with Live(console=self.console, transient=True, auto_refresh=False, vertical_overflow="ellipsis") as live:

            def writer(name: str) -> Write:
                def write(piece: str) -> None:
                    texts[name] += piece
                    live.update(_columns(texts), refresh=True)

                return write

            yield writer
        self.console.print(_columns(texts))

    def _section(self, name: str) -> Write:
        self.console.print(f"[{name}]", markup=False, highlight=False)
        first = True

        def write(piece: str) -> None:
            nonlocal first
            first = False
            self._write(piece)

        return write

    def _write(self, piece: str) -> None:
        self.console.file.write(piece)
        self.console.file.flush()


def _columns(texts: dict[str, str]) -> Table:
    table = Table(expand=True)
    for name in texts:
        table.add_column(escape(name), ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts.values()))
    return table
