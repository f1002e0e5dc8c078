"""A progress bar for rows, where there are enough of them to wait for."""

from collections.abc import Iterable, Sequence

from qlora_lightning.data.reader import Row

_WORTH_A_BAR = 2_000


def watch_rows(rows: Sequence[Row], description: str) -> Iterable[Row]:
    """Hand the rows on; beyond 2,000 rows with a bar on standard error that goes away at the end."""
    if len(rows) <= _WORTH_A_BAR:
        return rows
    from rich.console import Console
    from rich.progress import track

    return track(rows, description, console=Console(stderr=True), transient=True)
