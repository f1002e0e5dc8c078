"""What a search has found, as a table and as a picture."""

import io
import math
from typing import Any

from rich.console import Console
from rich.table import Table

_LINES = 12  # of the table


def print_search(found: dict[str, Any]) -> None:
    """Print some of the steps, the suggested one among them, and the suggestion."""
    rates, losses, suggestion = found["learning_rate"], found["loss"], found["suggestion"]
    console = Console(highlight=False)
    table = Table("learning rate", "loss, smoothed", "", title="Learning rates", title_justify="left")
    for column in table.columns[:2]:
        column.justify = "right"
    for place in _shown(len(losses), rates.index(suggestion) if suggestion in rates else None):
        mark = "steepest" if rates[place] == suggestion else ""
        table.add_row(f"{rates[place]:.2e}", f"{losses[place]:.4f}", mark, style="bold" if mark else "")
    console.print(table)
    if suggestion is not None:
        console.print(f"Suggested: [bold]--model.learning_rate {suggestion:.1e}[/bold]")


def draw_search(found: dict[str, Any], kind: str) -> bytes:
    """Draw losses over rates, the suggested one marked, as a picture of that kind: png, svg or pdf."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    rates, losses, suggestion = found["learning_rate"], found["loss"], found["suggestion"]
    points = [(rate, loss) for rate, loss in zip(rates, losses, strict=False) if math.isfinite(loss)]
    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), color="#2a6fb0")
    if suggestion is not None:
        axes.plot(suggestion, dict(points)[suggestion], "o", color="#2a6fb0", label=f"suggested: {suggestion:.1e}")
        axes.legend(frameon=False)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss, smoothed (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind)
    return picture.getvalue()


def _shown(count: int, suggested: int | None) -> list[int]:
    step = max(1, math.ceil(count / _LINES))
    return sorted({*range(0, count, step), *([] if suggested is None else [suggested])})
