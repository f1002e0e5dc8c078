"""A progress bar for rows, where they take long enough to wait for."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_lightning.data.samples.prepare import Watch

_PATIENCE = 1.0  # seconds without a bar


@contextmanager
def rows_bar(description: str, show: bool = True) -> Iterator[Watch]:
    """Give what is told how many rows are done; after a second it draws a bar on standard error, gone at the end.

    In a file or a pipe there is none.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} rows"), TimeElapsedColumn()
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(description, total=None)  # how many there are is known when they have been read
    began = time.monotonic()

    def watch(rows: int) -> None:
        progress.update(task, completed=rows)
        if show and console.is_terminal and not progress.live.is_started and time.monotonic() - began > _PATIENCE:
            progress.start()

    try:
        yield watch
    finally:
        if progress.live.is_started:
            progress.stop()
