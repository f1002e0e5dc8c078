"""The table of all figures, and its picture."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

PLAIN, CHECKPOINTED, BUSY = "plain", "checkpointed", "beside busy loops"
_UNITS = ("tokens/s", "share of idle speed", "share of ceiling", "peak memory, GB", "kB a token", "seconds")


class Row(NamedTuple):
    """A line of the table: our figure and the peer's, if it has one, as medians of the runs."""

    unit: str
    what: str
    ours: float
    peer: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
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
    speeds = {row.what: row.ours for row in rows if row.unit == "tokens/s"}
    if BUSY in speeds:
        rows.append(Row("share of idle speed", BUSY, speeds[BUSY] / speeds[PLAIN]))
    return sorted(rows, key=lambda row: _UNITS.index(row.unit))


def _figures_of(run: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Return the figures of a run by unit and name."""
    setting = run["setting"]
    figures = {("tokens/s", setting): run["tokens"] / run["seconds"]}
    if "ceiling_share" in run:
        figures["share of ceiling", setting] = run["ceiling_share"]
    if "peak_bytes" in run:
        figures["peak memory, GB", setting] = run["peak_bytes"] / 1e9
    if setting == PLAIN:
        figures["seconds", "second start"] = run["start_seconds"]
    if "quantizing" in run:  # a base of Llama-3.1-8B's shape
        figures["peak memory, GB", f"{setting}, private and base"] = run["together_bytes"] / 1e9
        figures["peak memory, GB", f"{setting}, private"] = run["private_bytes"] / 1e9
        figures["seconds", f"{setting}, second start"] = run["start_seconds"]
    elif "step_private_bytes" in run:
        figures["kB a token", setting] = run["step_private_bytes"] / run["tokens"] / 1e3
    return figures


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print a line for each row."""
    table = Table("", "", "peer", "ours", "ratio")
    for unit, group in itertools.groupby(rows, key=lambda row: row.unit):
        for row in group:
            ratio = "" if row.ratio is None else f"{row.ratio:.2f} ×"
            table.add_row(unit, row.what, _format(row.peer), _format(row.ours), ratio)
        table.add_section()
    console.print(table)


def _format(figure: float | None) -> str:
    return "" if figure is None else f"{figure:,.2f}" if figure < 100 else f"{figure:,.0f}"


def draw_plot(rows: Sequence[Row], file: Path) -> None:
    """Draw the rows as bars, a panel for each unit; the file's ending names the format."""
    from matplotlib.figure import Figure

    groups = [(unit, list(group)) for unit, group in itertools.groupby(rows, key=lambda row: row.unit)]
    heights = [1 + len(group) for _, group in groups]
    figure = Figure(figsize=(9, 1 + 0.4 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (unit, group), axes in zip(groups, panels, strict=True):
        for side, shift, colour in (("peer", 0.2, "tab:gray"), ("ours", -0.2, "tab:orange")):
            figures = [getattr(row, side) for row in group]
            heights = [place + shift for place in range(len(group), 0, -1)]  # the first one on top
            bars = axes.barh(heights, [each or 0 for each in figures], 0.4, color=colour, label=side)
            axes.bar_label(bars, list(map(_format, figures)), padding=2, fontsize="small")
        axes.set_yticks(range(len(group), 0, -1), [row.what for row in group])
        axes.set_title(unit)
        axes.margins(x=0.12)
    panels[0].legend()
    figure.savefig(file, dpi=150)
