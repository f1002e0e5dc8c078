"""The table of all figures."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

PLAIN, CHECKPOINTED = "plain", "checkpointed"
_UNITS = ("tokens/s", "peak memory, GB", "seconds")


class Row(NamedTuple):
    """A line of the table: our figure and the peer's, if it has one, as medians of the runs."""

    unit: str
    what: str
    ours: float
    peer: float | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.peer is None else self.ours / self.peer


def make_rows(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the lines of all runs, each with its ``side``, ``ours`` or ``peer``, and its ``setting``."""
    figures: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for line, figure in _figures_of(run).items():
            figures[line][run["side"]].append(figure)
    rows = [
        Row(*line, median(sides["ours"]), median(sides["peer"]) if "peer" in sides else None)
        for line, sides in figures.items()
        if "ours" in sides
    ]
    return sorted(rows, key=lambda row: _UNITS.index(row.unit))


def _figures_of(run: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    setting = run["setting"]
    figures = {("tokens/s", setting): run["tokens"] / run["seconds"]}
    if "peak_bytes" in run:
        figures["peak memory, GB", setting] = run["peak_bytes"] / 1e9
    if setting == PLAIN:
        figures["seconds", "second start"] = run["start_seconds"]
    if "quantizing" in run:  # a base of Llama-3.1-8B's shape
        figures["peak memory, GB", f"{setting}, private and base"] = run["together_bytes"] / 1e9
        figures["peak memory, GB", f"{setting}, private"] = run["private_bytes"] / 1e9
        figures["seconds", f"{setting}, second start"] = run["start_seconds"]
    return figures


def print_table(rows: Sequence[Row], console: Console) -> None:
    table = Table("", "", "peer", "ours", "ratio")
    for unit, group in itertools.groupby(rows, key=lambda row: row.unit):
        for row in group:
            ratio = "" if row.ratio is None else f"{row.ratio:.2f} ×"
            table.add_row(unit, row.what, _format(row.peer), _format(row.ours), ratio)
        table.add_section()
    console.print(table)


def _format(figure: float | None) -> str:
    return "" if figure is None else f"{figure:,.2f}" if figure < 100 else f"{figure:,.0f}"
