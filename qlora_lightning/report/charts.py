"""The charts of a run, and of several runs together, drawn by matplotlib as SVG that takes the page's colours."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qlora_lightning.evaluation.scores import describe_metric
from qlora_lightning.report.figures import read_comparison
from qlora_lightning.report.run_files import MEMORY, Points, Run

_KINDS = {
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_second": ("Speed", "tokens/s"),
    **dict.fromkeys(MEMORY, ("Peak memory", "GiB")),
}
_LOSSES = ("train_loss", "val_loss")
_NOISY = ("train_loss", "grad_norm", "tokens_per_second")
_UNDRAWN = (
    *("epoch", "val_perplexity", "labelled_tokens_per_second", "tokens_seen", "skipped_steps", "micro_batches"),
    *("memory_allocated_gib", "memory_reserved_gib", "private_memory_gib"),
)
_MOST_DOTS = 60  # of a curve: more would be one band
_STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 2},
    "faint": {"linewidth": 1.2, "alpha": 0.35},
    "dots": {"linewidth": 2, "markersize": 6},
    "level": {"linewidth": 1.5, "dashes": (4, 3)},
}
# Colours that stand for those of the page, which differ between light and dark.
_CURVE, _TEXT, _GRID = "#0000c", "#0000d0", "#0000d1"
_WIDE, _NARROW = (960, 280), (400, 230)  # of a drawing, in pixels of the page
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 16, 40  # margins, likewise
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "qlora_lightning",  # the same names in each drawing of the same curves
    "path.simplify_threshold": 0.5,
    "axes.autolimit_mode": "round_numbers",
    "axes.ymargin": 0,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-6, 9),
    "font.size": 12,
}


@dataclass(frozen=True)
class Curve:
    """One curve of a chart."""

    label: str
    points: Points
    style: str = "line"  # or faint (behind another curve), dots (few points), level (one value all across)
    colour: int = 0  # one of eight


@dataclass(frozen=True)
class Chart:
    """What a chart shows."""

    title: str
    unit: str  # of the y axis, in words
    curves: Sequence[Curve]  # the hindmost first
    x_label: str = "optimizer steps"
    from_zero: bool = True  # otherwise the y axis may be logarithmic

    @property
    def summary(self) -> str:
        """The chart in words."""
        curves = [curve for curve in self.curves if curve.style != "faint"]
        ends = (f"{each.label} from {each.points[0][1]:,.4g} to {each.points[-1][1]:,.4g}" for each in curves)
        return f"{self.title} over {self.x_label}: {', '.join(ends)}"

    @property
    def is_logarithmic(self) -> bool:
        """Whether the values are so far apart that a linear axis would flatten what matters."""
        values = [y for curve in self.curves for _, y in curve.points]
        return not self.from_zero and min(values) > 0 and max(values) > 20 * min(values)


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of one run, or of several with a curve for each: over tokens, if all have counted them."""
    by_tokens = len(runs) > 1 and all(run.metrics.get("tokens_seen") for run in runs)
    x_label = "tokens trained on" if by_tokens else "optimizer steps"

    def chart(name: str, title: str, unit: str) -> Chart:
        curves: list[Curve] = []
        for number, run in enumerate(runs):
            points = run.metrics.get(name, [])
            if by_tokens:
                steps, tokens = zip(*run.metrics["tokens_seen"], strict=True)
                points = [(float(np.interp(step, steps, tokens)), value) for step, value in points]
            style = "dots" if name.startswith("val_") else "line"
            if len(runs) > 1:
                curves.append(Curve(run.name, running_mean(points) if name in _NOISY else points, style, number % 8))
            elif name in _NOISY:
                curves += _smooth(title.lower(), points)
            else:
                curves.append(Curve(title, points, style, 1 if style == "dots" else 0))
        unit = ", ".join(filter(None, [unit, "smoothed" if len(runs) > 1 and name in _NOISY else ""]))
        return Chart(title, unit, curves, x_label, from_zero=name not in (*_LOSSES, "grad_norm"))

    logged = dict.fromkeys(name for run in runs for name in run.metrics)
    others = [name for name in logged if name not in (*_LOSSES, *_KINDS, *_UNDRAWN)]  # and what users log
    kinds = _KINDS | {name: (_heading(name), "") for name in others}
    unit = _loss_unit(runs)
    several = [chart("val_loss", "Validation loss", unit), chart("train_loss", "Training loss", unit)]
    return ([_loss_chart(runs[0])] if len(runs) == 1 else several) + [
        chart(name, *kind) for name, kind in kinds.items()
    ]


def _loss_chart(run: Run) -> Chart:
    training, validation = (run.metrics.get(name, []) for name in _LOSSES)
    steps, comparison = [step for step, _ in training + validation], read_comparison(run)
    curves = _smooth("training", training)
    if steps and comparison.split == "validation" and "loss" in comparison.metrics:
        base = comparison.metrics["loss"].base.value
        curves.append(Curve("base, validation", [(min(steps), base), (max(steps), base)], "level", 3))
    curves.append(Curve("validation", validation, "dots", 1))
    return Chart("Loss", _loss_unit([run]), curves, from_zero=False)


def _loss_unit(runs: Sequence[Run]) -> str:
    has_pairs = any("train_chosen_reward" in run.metrics for run in runs)  # of preferences
    return "mean over pairs" if has_pairs else "nats per labelled token"


def _smooth(label: str, points: Points) -> list[Curve]:
    """Return the values faintly, and their mean in front; short curves as they are."""
    if len(points) < 40:
        return [Curve(label, points)]
    mean = Curve(f"{label}, mean of {2 * (len(points) // 40) + 1} steps", running_mean(points))
    return [Curve(label, points, "faint"), mean]


def running_mean(points: Points) -> Points:
    """Average each value with its neighbours on both sides, a twentieth of a curve in all; near the ends with fewer."""
    reach, last = len(points) // 40, len(points) - 1
    sums = np.cumsum([0.0, *(y for _, y in points)])
    index = np.arange(len(points))
    own = np.minimum(reach, np.minimum(index, last - index))  # as many before as behind: the mean does not lag
    means = (sums[index + own + 1] - sums[index - own]) / (2 * own + 1)
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def draw_charts(charts: Sequence[Chart]) -> list[tuple[Chart, list[str]]]:
    """Draw charts over one range of steps: a step has the same x in all of them.

    A chart of one step says less than the tables, and is left out. The first is drawn narrow, for a phone, and wide.
    """
    charts = [replace(chart, curves=[curve for curve in chart.curves if curve.points]) for chart in charts]
    charts = [chart for chart in charts if any(each.points[0][0] < each.points[-1][0] for each in chart.curves)]
    steps = [x for chart in charts for curve in chart.curves for x, _ in curve.points]
    return [
        (chart, [_draw(chart, (min(steps), max(steps)), size) for size in ((_NARROW,) if number else (_NARROW, _WIDE))])
        for number, chart in enumerate(charts)
    ]


def _draw(chart: Chart, x_range: tuple[float, float], size: tuple[int, int]) -> str:
    # here, so that a fit starts without it
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    width, height = size
    with rc_context(_SETTINGS):
        figure = Figure((width / 72, height / 72), dpi=72)
        plot = (_LEFT / width, _BOTTOM / height, 1 - (_LEFT + _RIGHT) / width, 1 - (_TOP + _BOTTOM) / height)
        axes = figure.add_axes(plot, frame_on=False)
        for curve in chart.curves:
            are_seen = len(curve.points) == 1 or (curve.style == "dots" and len(curve.points) <= _MOST_DOTS)
            style = _STYLES[curve.style] | {"color": f"{_CURVE}{curve.colour}", "marker": "o" if are_seen else None}
            axes.plot(*zip(*curve.points, strict=True), solid_capstyle="round", clip_on=False, **style)
        axes.set_xlim(x_range)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params("x", nbins=5, integer=True, steps=[1, 2, 5, 10])
        values = [y for curve in chart.curves for _, y in curve.points]
        if chart.is_logarithmic:
            axes.set_yscale("log")
            axes.set_ylim(min(values) / 1.15, max(values) * 1.15)
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.locator_params("y", nbins=5, steps=[1, 2, 5, 10])
            if chart.from_zero:
                axes.update_datalim([(x_range[0], 0)])
            axes.autoscale_view(scalex=False)  # to whole ticks
        axes.set_xlabel(chart.x_label, loc="right", color=_TEXT)
        axes.tick_params(bottom=False, left=False, labelcolor=_TEXT)
        axes.grid(axis="y", color=_GRID, linewidth=1)
        axes.set_axisbelow(True)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _embed(file.getvalue(), width, height)


def _embed(svg: str, width: int, height: int) -> str:
    """Return a drawing without its head, in the page's colours and font."""
    inner = svg[svg.index("<defs>") :]
    inner = re.sub(r"<style.*?</style>|<!--.*?-->", "", inner, flags=re.DOTALL)
    inner = re.sub(rf"{_CURVE}([0-7])", r"var(--c\1)", inner)
    inner = inner.replace(_TEXT, "var(--soft)").replace(_GRID, "var(--line)")
    inner = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick)[^"]*"', "", inner)
    inner = re.sub(r"font(-size|-family)?: [^;\"]+; ?", "", inner)  # the page sets it by width
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{inner}'


def _heading(name: str) -> str:
    words = describe_metric(name.removeprefix("val_"))
    text = f"{words}, validation" if name.startswith("val_") else words
    return text[:1].upper() + text[1:]
