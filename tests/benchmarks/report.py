"""What the runs came to, as a table and as JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_lightning.errors import UserError
from qlora_lightning.safe_file import write_whole
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


def write_json(summary: dict[str, Any], file: Path) -> None:
    """Write the summary, whole or not at all."""
    write_whole(file, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def check_file(option: str, file: Path) -> None:
    """Refuse, before anything is measured, a file that cannot be written afterwards.

    Raises:
        UserError: it is a folder, its folder is not there, or it is another's.
    """
    folder = file.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{option} {file} cannot be written: there is no folder {file.parent}.")
    if file.is_dir():
        raise UserError(f"{option} {file}: expected a file to write, found a folder; name a file in it.")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise UserError(f"{option} {file} cannot be written: permission denied; name another file.")
