"""The charts of a run, and of several runs together, drawn by matplotlib as SVG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_lightning.evaluation.scores import describe_metric
from qlora_lightning.report.run_files import Points, Run
from qlora_lightning.support.files import MEMORY_PEAKS

_KINDS = {
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_second": ("Speed", "tokens/s"),
    **dict.fromkeys(MEMORY_PEAKS, ("Peak memory", "GiB")),
}
_LOSSES = ("train_loss", "val_loss")
_NOISY = ("train_loss", "grad_norm", "tokens_per_second")
_UNDRAWN = (
    *("epoch", "train_perplexity", "val_perplexity", "labelled_tokens_per_second", "rows_per_second", "tokens_seen"),
    *("train_token_accuracy", "micro_batches", "memory_allocated_gib", "memory_reserved_gib", "private_memory_gib"),
)
_STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 2},
    "faint": {"linewidth": 1.2, "alpha": 0.35},
    "dots": {"linewidth": 2, "marker": "o", "markersize": 5},
    "level": {"linewidth": 1.5, "dashes": (4, 3)},
}
COLOURS = ("#2567a8", "#c2540a", "#177a4f", "#9a3a8c", "#7d6508", "#b3263a", "#0c7f8f", "#5b5f97")
_GREY = "#626b77"
_WIDTH, _HEIGHT = 400, 230  # in pixels of the page
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "qlora_lightning",  # the same names in each drawing of the same curves
    "path.simplify_threshold": 0.5,
    "axes.autolimit_mode": "round_numbers",  # to whole ticks
    "axes.ymargin": 0,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-6, 9),
    "font.size": 12,
}


@dataclass(frozen=True)
class Curve:
    """One curve of a chart."""

    label: str  # empty for the raw curve under its mean
    points: Points
    style: str = "line"  # or faint, dots (few points), level (one value all across)
    colour: str = COLOURS[0]


@dataclass(frozen=True)
class Chart:
    """What a chart shows."""

    title: str
    unit: str  # of the y axis, in words
    curves: Sequence[Curve]  # from back to front
    x_label: str = "optimizer steps"
    from_zero: bool = True  # whether the y axis begins there

    @property
    def keys(self) -> list[Curve]:
        """The curves that have a name."""
        return [curve for curve in self.curves if curve.label]

    @property
    def summary(self) -> str:
        """The chart in words."""
        ranges = (f"{curve.label} from {curve.points[0][1]:,.4g} to {curve.points[-1][1]:,.4g}" for curve in self.keys)
        return f"{self.title} over {self.x_label}: {', '.join(ranges)}"


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of one run, or of several with a curve for each: over tokens, if all have counted them.

    A chart of one step says less than the tables, and is left out.
    """
    logged = dict.fromkeys(name for run in runs for name in run.metrics)
    other_metrics = [name for name in logged if name not in (*_LOSSES, *_KINDS, *_UNDRAWN)]  # also those of users
    kinds = _KINDS | {name: (describe_metric(name), "") for name in other_metrics}
    has_preferences = any("train_margin" in run.metrics for run in runs)
    loss_unit = "mean over rows" if has_preferences else "nats per labeled token"
    if len(runs) > 1:
        losses = {"val_loss": ("Validation loss", loss_unit), "train_loss": ("Training loss", loss_unit)}
        charts = [_compare_runs(runs, name, *kind) for name, kind in (losses | kinds).items()]
    else:
        charts = [_chart_of_losses(runs[0], loss_unit)]
        for name, (title, unit) in kinds.items():
            label = title.lower() if name in _NOISY else title
            charts.append(Chart(title, unit, _curves_of(runs[0], name, label), from_zero=name != "grad_norm"))
    return [chart for chart in charts if any(curve.points[0][0] < curve.points[-1][0] for curve in chart.curves)]


def _chart_of_losses(run: Run, unit: str) -> Chart:
    training, validation = _curves_of(run, "train_loss", "training"), _curves_of(run, "val_loss", "validation")
    steps = [step for curve in training + validation for step, _ in curve.points]
    if steps and "loss" in run.comparison:
        loss = run.comparison["loss"].base.value
        training.append(Curve("base, validation", [(min(steps), loss), (max(steps), loss)], "level", COLOURS[3]))
    return Chart("Loss", unit, training + validation, from_zero=False)


def _curves_of(run: Run, name: str, label: str) -> list[Curve]:
    """Return a metric as a curve; a noisy and long one as a faint curve with its running mean in front."""
    points = run.metrics.get(name)
    if not points:
        return []
    if name.startswith("val_"):
        return [Curve(label, points, "dots", COLOURS[1])]
    if name not in _NOISY or len(points) < 40:
        return [Curve(label, points)]
    mean = Curve(f"{label}, mean of {2 * (len(points) // 40) + 1} steps", running_mean(points))
    return [Curve("", points, "faint"), mean]


def _compare_runs(runs: Sequence[Run], name: str, title: str, unit: str) -> Chart:
    """Return the chart of a metric of several runs, over tokens if all have counted them."""
    by_tokens, curves = all(run.metrics.get("tokens_seen") for run in runs), []
    for index, run in enumerate(runs):
        points = run.metrics.get(name)
        if not points:
            continue
        if by_tokens:
            steps, tokens = zip(*run.metrics["tokens_seen"], strict=True)
            points = [(float(np.interp(step, steps, tokens)), value) for step, value in points]
        points = running_mean(points) if name in _NOISY else points
        style = "dots" if name.startswith("val_") else "line"
        curves.append(Curve(run.name, points, style, COLOURS[index % len(COLOURS)]))
    unit = ", ".join(filter(None, [unit, "smoothed" if name in _NOISY else ""]))
    x_label = "tokens trained on" if by_tokens else "optimizer steps"
    return Chart(title, unit, curves, x_label, from_zero=name not in (*_LOSSES, "grad_norm"))


def running_mean(points: Points) -> Points:
    """Average each value with its neighbors on both sides, a twentieth of a curve in all; near the ends with fewer."""
    window = np.ones(2 * (len(points) // 40) + 1)
    if len(window) == 1:
        return points
    sums = np.convolve([value for _, value in points], window, "same")
    counts = np.convolve(np.ones(len(points)), window, "same")
    return [(x, float(mean)) for (x, _), mean in zip(points, sums / counts, strict=True)]


def draw(chart: Chart) -> str:
    """Draw a chart as SVG."""
    # here, so that a fit starts without it
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        figure = Figure((_WIDTH / 72, _HEIGHT / 72), dpi=72)
        axes = figure.add_axes((0.13, 0.17, 0.84, 0.76), frame_on=False)
        for curve in chart.curves:
            style = _STYLES[curve.style] | {"color": curve.colour, "clip_on": False}
            axes.plot(*zip(*curve.points, strict=True), solid_capstyle="round", **style)
        axes.set_xlim(axes.dataLim.intervalx)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params("x", nbins=5, integer=True)
        axes.locator_params("y", nbins=5)
        if chart.from_zero:
            axes.update_datalim([(chart.curves[0].points[0][0], 0)])
        axes.set_xlabel(chart.x_label, loc="right", color=_GREY)
        axes.tick_params(which="both", bottom=False, left=False, labelcolor=_GREY)
        axes.grid(axis="y", color=_GREY, alpha=0.2, linewidth=1)
        axes.set_axisbelow(True)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue().partition("</metadata>")[2]  # without its head, which names addresses
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true">{svg}'
