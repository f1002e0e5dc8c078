"""The charts of a run, and of several runs together, drawn by matplotlib as SVG that takes the page's colours."""

import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_lightning.base.tensors import GIB
from qlora_lightning.evaluation.scores import describe_metric
from qlora_lightning.report.results import BASE, is_of_fit, measured
from qlora_lightning.report.run import Points, Run

_MEMORY = ("memory_peak_gib", "peak_rss_gib")  # of a GPU; of the process
_DRAWN = ("train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second")
_UNDRAWN = (
    *("epoch", "val_perplexity", "labelled_tokens_per_second", "tokens_seen", "skipped_steps"),
    *("memory_allocated_gib", "memory_reserved_gib", "private_memory_gib"),
)
_UNLIKE = 1.05  # tokens per step that differ by more: steps of one run are not those of another
_LOG_FROM = 20.0  # times the lowest value: from there on a linear axis would flatten what matters
_MOST_DOTS = 60  # of a curve: more would be one band
_HOVERED = 300  # points of a curve that answer to the pointer, at most
_STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 2},
    "faint": {"linewidth": 1.2, "alpha": 0.35},
    "dots": {"linewidth": 2, "markersize": 6},
    "level": {"linewidth": 1.5, "dashes": (4, 3)},
}
# Colours that stand for those of the page, which differ between light and dark.
_CURVE, _TEXT, _GRID = "#0000c", "#0000d0", "#0000d1"
_SIZES = {"wide": (960, 280), "narrow": (400, 230)}  # of a drawing, in pixels of the page
_MARGINS = (52, 10, 16, 40)  # left, right, top, bottom


@dataclass(frozen=True)
class Curve:
    """One curve of a chart.

    Attributes:
        label: Its name in the legend.
        points: What is drawn.
        style: ``line``, ``faint`` (behind another curve), ``dots`` (few points) or ``level`` (one value, all across).
        colour: Number of its colour.
    """

    label: str
    points: Points
    style: str = "line"
    colour: int = 0


@dataclass(frozen=True)
class Chart:
    """What a chart shows.

    Attributes:
        title: What is measured.
        unit: Of the y axis, in words.
        curves: The hindmost first.
        x_label: Of the x axis.
        from_zero: Whether the y axis begins at 0; otherwise it may be logarithmic.
        are_shares: Whether the y axis is from 0 to 1.
    """

    title: str
    unit: str
    curves: Sequence[Curve]
    x_label: str = "optimizer steps"
    from_zero: bool = True
    are_shares: bool = False


def charts_of(run: Run) -> list[Chart]:
    """Return the charts of one run; those without a curve are left out when they are drawn."""
    metrics = run.metrics
    peak = next((name for name in _MEMORY if metrics.get(name)), "")
    planned = (run.plan.get("predicted") or {}).get("peak_bytes")
    memory = [Curve("peak", metrics.get(peak, []))]
    memory += [Curve("planned", [(0, planned / GIB)], "level", 3)] if planned else []
    clip = (run.config.get("trainer") or {}).get("gradient_clip_val")
    norms = metrics.get("grad_norm", [])
    clips = [Curve(f"clipped to {clip:g}", [(0, clip)], "level", 3)] if clip and any(y > clip for _, y in norms) else []
    base = measured(run, "loss", BASE) if is_of_fit(run) else None
    return [
        Chart(
            "Loss",
            "nats per labelled token",
            [
                *_smoothed("training", metrics.get("train_loss", [])),
                *([Curve("base, validation", [(0, base)], "level", 3)] if base else []),
                Curve("validation", metrics.get("val_loss", []), "dots", 1),
            ],
            from_zero=False,
        ),
        Chart("Learning rate", "", [Curve("learning rate", metrics.get("learning_rate", []))]),
        Chart("Gradient norm", "before clipping", [*_smoothed("gradient norm", norms), *clips], from_zero=False),
        Chart("Speed", "tokens/s", [*_smoothed("tokens/s", metrics.get("tokens_per_second", []))]),
        Chart("Memory", "GiB", memory),
        *(_other_chart(name, [Curve(_heading(name), metrics[name], _style(name), 1)]) for name in _others([run])),
    ]


def charts_of_all(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of several runs, a curve a run; over tokens if their steps are of different sizes."""
    by_tokens = _steps_differ(runs)
    x_label = "tokens trained on" if by_tokens else "optimizer steps"

    def curves(*names: str, smooth: bool = False) -> list[Curve]:
        found = []
        for number, run in enumerate(runs):
            name = next((name for name in names if run.metrics.get(name)), names[0])
            points = run.metrics.get(name, [])
            points = running_mean(points) if smooth else points
            if by_tokens:
                tokens = dict(run.metrics["tokens_seen"])
                points = [(tokens[step], value) for step, value in points if step in tokens]
            found.append(Curve(run.name, points, _style(name), number))
        return found

    return [
        Chart("Validation loss", "nats per labelled token", curves("val_loss"), x_label, from_zero=False),
        Chart("Training loss", "nats, smoothed", curves("train_loss", smooth=True), x_label, from_zero=False),
        Chart("Learning rate", "", curves("learning_rate"), x_label),
        Chart("Gradient norm", "before clipping, smoothed", curves("grad_norm", smooth=True), x_label, from_zero=False),
        Chart("Speed", "tokens/s, smoothed", curves("tokens_per_second", smooth=True), x_label),
        Chart("Peak memory", "GiB", curves(*_MEMORY), x_label),
        *(_other_chart(name, curves(name), x_label) for name in _others(runs)),
    ]


def running_mean(points: Points) -> Points:
    """Average each value with its neighbours on both sides, a twentieth of a curve in all; near the ends with fewer."""
    reach, last = len(points) // 40, len(points) - 1
    sums = list(itertools.accumulate((y for _, y in points), initial=0.0))
    found = []
    for place, (x, _) in enumerate(points):
        own = min(reach, place, last - place)  # as many before as behind: the mean does not lag
        found.append((x, (sums[place + own + 1] - sums[place - own]) / (2 * own + 1)))
    return found


def draw_charts(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """Draw charts over one range of steps: what happens at one step is at one place in all of them.

    A chart whose curves have one point each says less than the tables, and is left out. The first is drawn ``wide``
    as well as ``narrow``, for a phone.

    Returns:
        For each ``title``, ``unit``, ``keys`` (label, style, colour), ``drawings`` (kind, SVG, where its plot begins
        and ends, as shares), ``x_name``, and ``data``, JSON of the curves for the pointer.
    """
    charts = [replace(chart, curves=[curve for curve in chart.curves if curve.points]) for chart in charts]
    charts = [chart for chart in charts if any(len(curve.points) > 1 for curve in chart.curves)]
    steps = [x for chart in charts for curve in chart.curves if curve.style != "level" for x, _ in curve.points]
    return [
        _draw(chart, (min(steps), max(steps)), ("wide", "narrow") if number == 0 else ("narrow",))
        for number, chart in enumerate(charts)
    ]


def _draw(chart: Chart, x_range: tuple[float, float], kinds: Sequence[str]) -> dict[str, Any]:
    named = [curve for curve in chart.curves if curve.style != "faint"]
    is_log = _is_logarithmic(chart)
    hovered = [
        {"label": curve.label, "colour": curve.colour % 8, "points": _thin(curve.points, _HOVERED)} for curve in named
    ]
    drawings = []
    for kind in kinds:
        (width, _), (left, right, _, _) = _SIZES[kind], _MARGINS
        svg = _draw_svg(chart, x_range, is_log, _SIZES[kind])
        drawings.append((kind, svg, left / width, 1 - right / width))
    return {
        "title": chart.title,
        "unit": " · ".join(filter(None, [chart.unit, "log scale" if is_log else ""])),
        "keys": [(curve.label, curve.style, curve.colour % 8) for curve in chart.curves],
        "drawings": drawings,
        "x_name": chart.x_label.partition(" ")[0] if chart.x_label.startswith("tokens") else "step",
        "summary": f"{chart.title} over {chart.x_label}. {' '.join(map(_describe, named))}",
        "data": json.dumps({"x": x_range, "curves": hovered}, separators=(",", ":")),
    }


def _draw_svg(chart: Chart, x_range: tuple[float, float], is_log: bool, size: tuple[int, int]) -> str:
    # here, so that a fit starts without it
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import (
        EngFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
        ScalarFormatter,
        StrMethodFormatter,
    )

    (width, height), (left, right, top, bottom) = size, _MARGINS
    settings: Any = {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": "qlora_lightning",  # the same names in each drawing of the same curves
        "path.simplify_threshold": 0.5,
        "axes.autolimit_mode": "round_numbers",
        "axes.ymargin": 0,
        "font.size": 12,
    }
    with rc_context(settings):
        figure = Figure((width / 72, height / 72), dpi=72)
        axes = figure.add_axes(
            (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height), frame_on=False
        )
        for curve in chart.curves:
            colour, style = f"{_CURVE}{curve.colour % 8}", _STYLES[curve.style]
            if curve.style == "level":
                axes.axhline(curve.points[0][1], color=colour, **style)
                continue
            are_seen = len(curve.points) == 1 or (curve.style == "dots" and len(curve.points) <= _MOST_DOTS)
            dashes, marker = ("-", "--", ":")[curve.colour // 8 % 3], "o" if are_seen else None
            x, y = zip(*curve.points, strict=True)
            axes.plot(x, y, dashes, marker=marker, color=colour, solid_capstyle="round", clip_on=False, **style)
        axes.set_xlim(*(x_range if x_range[0] < x_range[1] else (x_range[0] - 1, x_range[0] + 1)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(
            EngFormatter(sep="") if x_range[1] >= 100_000 else StrMethodFormatter("{x:,.0f}")
        )
        if is_log:
            axes.set_yscale("log")
            values = [y for curve in chart.curves for _, y in curve.points]
            axes.set_ylim(min(values) / 1.15, max(values) * 1.15)
            factors = (1, 2, 5) if max(values) / min(values) < 1000 else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=factors))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            most = max(abs(y) for curve in chart.curves for _, y in curve.points)
            short = StrMethodFormatter("{x:,.0f}" if most >= 1000 else "{x:g}")
            axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False) if 0.01 <= most < 1000 else short)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            if chart.from_zero:
                axes.update_datalim([(x_range[0], 0)])
            axes.autoscale_view(scalex=False)  # to whole ticks
            if chart.are_shares:
                axes.set_ylim(0, 1)
        axes.set_xlabel(chart.x_label, loc="right", color=_TEXT)
        axes.tick_params(bottom=False, left=False, labelcolor=_TEXT)
        axes.grid(axis="y", color=_GRID, linewidth=1)
        axes.set_axisbelow(True)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _embed(file.getvalue(), width, height)


def _embed(svg: str, width: int, height: int) -> str:
    """Return a drawing without its head, in the page's colours and font."""
    inner = svg[svg.index("<defs>") :] if "<defs>" in svg else svg
    inner = re.sub(r"<style.*?</style>|<!--.*?-->", "", inner, flags=re.DOTALL)
    inner = re.sub(rf"{_CURVE}([0-7])", r"var(--c\1)", inner)
    inner = inner.replace(_TEXT, "var(--soft)").replace(_GRID, "var(--line)")
    inner = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick)[^"]*"', "", inner)
    inner = re.sub(r"font(-size|-family)?: [^;\"]+; ?", "", inner)  # the page sets it by width
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{inner}'


def _is_logarithmic(chart: Chart) -> bool:
    values = [y for curve in chart.curves for _, y in curve.points]
    return not (chart.from_zero or chart.are_shares) and min(values) > 0 and max(values) > _LOG_FROM * min(values)


def _thin(points: Points, most: int) -> Points:
    return points[:: -(-len(points) // most)] + points[-1:]


def _describe(curve: Curve) -> str:
    values = [y for _, y in curve.points]
    if len(values) == 1:
        return f"{curve.label}: {values[0]:,.4g}."
    return (
        f"{curve.label}: from {values[0]:,.4g} to {values[-1]:,.4g}, between {min(values):,.4g} and {max(values):,.4g}."
    )


def _smoothed(label: str, points: Points) -> Iterator[Curve]:
    """Yield the values faintly, and their mean in front; short curves as they are."""
    if len(points) < 40:
        yield Curve(label, points)
        return
    yield Curve(label, points, "faint")
    yield Curve(f"{label}, mean of {2 * (len(points) // 40) + 1} steps", running_mean(points))


def _other_chart(name: str, curves: Sequence[Curve], x_label: str = "optimizer steps") -> Chart:
    """Draw a metric that has no chart of its own: most are scores, which are shares."""
    are_shares = all(0 <= value <= 1 for curve in curves for _, value in curve.points)
    return Chart(_heading(name), "", curves, x_label, from_zero=False, are_shares=are_shares)


def _style(name: str) -> str:
    return "dots" if name.startswith("val_") else "line"


def _others(runs: Sequence[Run]) -> list[str]:
    """Name the columns that have no chart of their own: further metrics of validations, and what users log."""
    names = dict.fromkeys(name for run in runs for name, points in run.metrics.items() if points)
    return [name for name in names if name not in (*_DRAWN, *_MEMORY, *_UNDRAWN)]


def _heading(name: str) -> str:
    words = describe_metric(name.removeprefix("val_"))
    text = f"{words}, validation" if name.startswith("val_") else words
    return text[:1].upper() + text[1:]


def _steps_differ(runs: Sequence[Run]) -> bool:
    seen = [points[-1] for run in runs if (points := run.metrics.get("tokens_seen"))]
    sizes = [tokens / step for step, tokens in seen if step and tokens]
    return len(sizes) == len(runs) and max(sizes) > _UNLIKE * min(sizes)
