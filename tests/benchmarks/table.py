"""The table of all figures, and its picture."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tests.benchmarks.child import write_whole

PLAIN, CHECKPOINTED, EVERY_2ND = "plain", "checkpointed", "every 2nd layer checkpointed"
BUSY, SCARCE = "beside busy loops", "memory scarce"
_UNITS = (
    *("tokens/s", "share of idle speed", "share of ceiling", "ceiling, tokens/s", "ceiling, GFLOP/s"),
    *("difference of losses", "peak memory, GB", "kB a token", "seconds"),
)


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        unit: Of the figures; lines of one unit are together.
        what: Was measured.
        ours: Our figure, the median of the runs.
        peer: The peer's, if it has one.
    """

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
    figures: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in runs:
        for line, figure in _figures_of(run).items():
            figures.setdefault(line, {"ours": [], "peer": []})[run["side"]].append(figure)
    rows = [
        Row(unit, what, median(sides["ours"]), median(sides["peer"]) if sides["peer"] else None)
        for (unit, what), sides in figures.items()
        if sides["ours"]
    ]
    speeds = {row.what: row.ours for row in rows if row.unit == "tokens/s"}
    if BUSY in speeds:
        rows.append(Row("share of idle speed", BUSY, speeds[BUSY] / speeds[PLAIN]))
    return sorted(rows, key=lambda row: _UNITS.index(row.unit))


def _figures_of(run: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Return what a run has to say, by unit and name."""
    setting = run["setting"]
    figures = {("tokens/s", setting): run["tokens"] / run["seconds"]}
    if "validation" in run:
        figures["tokens/s", "validation"] = run["validation"]["tokens"] / run["validation"]["seconds"]
    for name, timed in ((setting, run.get("steady")), ("validation", run.get("validation"))):
        if timed:
            figures["share of ceiling", name] = timed["ceiling_seconds"] / timed["seconds"]
            figures["ceiling, tokens/s", name] = timed["tokens"] / timed["ceiling_seconds"]
            figures["ceiling, GFLOP/s", name] = timed["ceiling_flop"] / timed["ceiling_seconds"] / 1e9
    if setting == SCARCE:
        figures["difference of losses", setting] = run["loss_difference"]
    if "peak_bytes" in run:
        figures["peak memory, GB", setting] = run["peak_bytes"] / 1e9
    if setting == PLAIN:
        figures["seconds", "second start"] = run["start_seconds"]
    if setting == PLAIN and run["side"] == "ours":
        figures["seconds", "second start, of it imports"] = run["import_seconds"]
        figures["seconds", "second start, after the imports"] = run["start_seconds"] - run["import_seconds"]
    if "layers" in run:  # a base of Llama-3.1-8B's shape
        figures["peak memory, GB", f"{setting}, private and base"] = run["together_bytes"] / 1e9
        figures["peak memory, GB", f"{setting}, private"] = run["private_bytes"] / 1e9
        figures["peak memory, GB", f"{setting}, mapped files"] = run["mapped_bytes"] / 1e9
        figures["seconds", f"{setting}, second start"] = run["start_seconds"]
    elif "step_private_bytes" in run:
        figures["kB a token", setting] = run["step_private_bytes"] / run["tokens"] / 1e3
    return figures


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print a line for each row."""
    table = Table("", "", "peer", "ours", "ratio")
    for column in table.columns[2:]:
        column.justify = "right"
    for unit, group in itertools.groupby(rows, key=lambda row: row.unit):
        for row in group:
            ratio = "" if row.ratio is None else f"{row.ratio:.2f} ×"
            table.add_row(unit, row.what, _format(row.peer), _format(row.ours), ratio)
        table.add_section()
    console.print(table)


def _format(figure: float | None) -> str:
    if figure is None:
        return ""
    return f"{figure:,.2f}" if figure < 100 else f"{figure:,.0f}"


def draw_plot(rows: Sequence[Row], file: Path) -> None:
    """Draw the rows as bars, a panel for each unit; the file's ending names the format."""
    from matplotlib.figure import Figure

    units = [unit for unit in _UNITS if any(row.unit == unit for row in rows)]
    heights = [1 + sum(row.unit == unit for row in rows) for unit in units]
    figure = Figure(figsize=(9, 1 + 0.4 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(units), 1, squeeze=False, height_ratios=heights)[:, 0] if units else []
    for unit, axes in zip(units, panels, strict=True):
        shown = [row for row in rows if row.unit == unit]
        places = range(len(shown), 0, -1)  # the first one on top
        for side, shift, colour in (("peer", 0.2, "tab:gray"), ("ours", -0.2, "tab:orange")):
            figures = [getattr(row, side) for row in shown]
            lengths = [each or 0 for each in figures]
            bars = axes.barh([place + shift for place in places], lengths, 0.4, color=colour, label=side)
            axes.bar_label(bars, list(map(_format, figures)), padding=2, fontsize="small")
        axes.set_yticks(places, [row.what for row in shown])
        axes.set_title(unit)
        axes.margins(x=0.12)
    if units:
        panels[0].legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format=file.suffix[1:].lower(), dpi=150)
    write_whole(file, drawn.getvalue())
