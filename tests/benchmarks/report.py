"""What the runs came to, as a table and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.table import Row

_MARKS = {True: "yes", False: "no", None: ""}


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print a line for each row."""
    table = Table("", "peer", "ours", "ratio", "goal", "reached")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        peer = "" if row.peer is None else f"{row.peer:,.{row.digits}f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} ×"
        goal = "" if row.goal is None else str(row.goal)
        table.add_row(row.what, peer, f"{row.ours:,.{row.digits}f}", ratio, goal, _MARKS[row.reached])
    console.print(table)


def print_scaling(sizes: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print tokens/s and memory for each size of a batch."""
    table = Table("tokens a batch", "short rows: tokens/s", "kB per token", "one long row: tokens/s", "kB per token")
    for column in table.columns:
        column.justify = "right"
    for tokens in dict.fromkeys(size["tokens"] for size in sizes):
        cells = [
            cell
            for size in sizes  # short rows come first
            if size["tokens"] == tokens
            for cell in (f"{size['tokens_per_second']:.1f}", f"{size['bytes_per_token'] / 1e3:.0f}")
        ]
        table.add_row(f"{tokens:,}", *cells)
    console.print(table)


def rows_as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Give rows with all that follows from them."""
    return [
        {
            "what": row.what.strip(),
            "peer": row.peer,
            "ours": row.ours,
            "ratio": row.ratio,
            "goal": None if row.goal is None else asdict(row.goal),
            "reached": row.reached,
        }
        for row in rows
    ]
