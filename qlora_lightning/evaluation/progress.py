"""A bar for work that takes minutes, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def steps_bar(description: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Give what is told how many more steps are done; in a terminal it moves a bar, gone at the end."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(escape(description), total=total)
        yield lambda steps: progress.advance(task, steps)
