"""The figures as a picture: bars of both sides beside the ceiling, and lines over the size of a batch."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_lightning.commands.json_output import write_output
from tests.benchmarks.table import Row

_COLOURS = {"peer": "tab:gray", "ours": "tab:orange", "ceiling": "tab:blue"}


def draw_plot(rows: Sequence[Row], sizes: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the rows, and the sizes where they were measured. It takes matplotlib.

    Args:
        rows: of the table.
        sizes: what ``measure_scaling`` found; may be empty.
        file: its ending names the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8 if sizes else 4), layout="constrained")
    grid = figure.subplots(2 if sizes else 1, 3, squeeze=False)
    _draw_bars(
        grid[0][0], "tokens/s (more is better)", "%.0f", [row for row in rows if _is_speed(row)], _ceilings(rows)
    )
    memory = [row for row in rows if row.what.startswith(("peak RSS", "GPU memory"))]
    _draw_bars(grid[0][1], "memory, GB (less is better)", "%.2f", memory, {})
    _draw_shares(grid[0][2], [row for row in rows if row.what.startswith("share of ceiling")])
    if sizes:
        _draw_lines(grid[1][0], sizes, "tokens_per_second", 1, "tokens/s")
        _draw_lines(grid[1][1], sizes, "bytes_per_token", 1e3, "memory per token, kB")
        grid[1][2].axis("off")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=file.suffix[1:].lower(), dpi=150)
    write_output(file, drawn.getvalue())


def _is_speed(row: Row) -> bool:
    return row.what.startswith("tokens/s, ")


def _name(row: Row) -> str:
    return row.what.rpartition(", ")[2].removesuffix(" (GB)")


def _ceilings(rows: Sequence[Row]) -> dict[str, float]:
    return {_name(row): row.ours for row in rows if row.what.startswith("  ceiling tokens/s")}


def _draw_bars(axes: Any, title: str, form: str, rows: Sequence[Row], ceilings: Mapping[str, float]) -> None:
    heights = {
        "peer": [row.peer for row in rows],
        "ours": [row.ours for row in rows],
        "ceiling": [ceilings.get(_name(row)) for row in rows],
    }
    shown = {name: values for name, values in heights.items() if any(value is not None for value in values)}
    for at, (name, values) in enumerate(shown.items()):
        places = [group + at * 0.8 / len(shown) for group in range(len(rows))]
        known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        bars = axes.bar(*zip(*known, strict=True), width=0.8 / len(shown), label=name, color=_COLOURS[name])
        axes.bar_label(bars, fmt=form, fontsize="small")
    axes.set_xticks([group + 0.4 - 0.4 / len(shown) for group in range(len(rows))], [_wrap(_name(row)) for row in rows])
    axes.set_title(title)
    axes.margins(y=0.15)
    axes.legend()


def _draw_shares(axes: Any, rows: Sequence[Row]) -> None:
    bars = axes.bar([_wrap(_name(row)) for row in rows], [row.ours for row in rows], color=_COLOURS["ours"])
    axes.bar_label(bars, fmt="%.2f", fontsize="small")
    for at, row in enumerate(rows):
        if row.goal is not None:
            axes.hlines(row.goal.value, at - 0.4, at + 0.4, colors="black", linestyles="dashed")
    axes.set_ylim(0, max([1.0, *(1.1 * row.ours for row in rows)]))  # own products may be quicker than torch's
    axes.set_title("share of the ceiling (dashed: goal)")


def _draw_lines(axes: Any, sizes: Sequence[Mapping[str, Any]], key: str, unit: float, title: str) -> None:
    for rows in ("short", "long"):
        points = [(size["tokens"], size[key] / unit) for size in sizes if size["rows"] == rows]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{rows} rows" if rows == "short" else "one long row")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens a batch")
    axes.set_title(title)
    axes.legend()


def _wrap(name: str) -> str:
    return name.replace(" ", "\n")
