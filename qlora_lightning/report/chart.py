"""Charts as places: what a template draws as SVG, in shares of the plot, so that it fits a phone and a wide screen."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from typing import Any

from qlora_lightning.report.series import Series, thin
from qlora_lightning.report.ticks import linear_ticks, log_ticks, write_number

_SIDE = 1000  # of the square that curves are drawn in, before it is stretched over the plot
_ROOM = 1.15  # factor that a logarithmic axis goes beyond its values
_LOG_FROM = 20.0  # times the lowest value: from there on a linear axis would flatten what matters


@dataclass(frozen=True)
class Chart:
    """What a chart shows.

    Attributes:
        title: What is measured.
        unit: Of the y axis, in words; empty where there is none.
        series: The curves, the hindmost first.
        x_label: Of the x axis.
        from_zero: Whether a linear y axis begins at 0; another may be logarithmic.
        x_range: First and last x; ``None``: those of the curves.
        are_shares: Whether the values are shares, which lie from 0 to 1.
    """

    title: str
    unit: str
    series: Sequence[Series]
    x_label: str = "optimizer steps"
    from_zero: bool = True
    x_range: tuple[float, float] | None = None
    are_shares: bool = False


class Axis:
    """Maps values to shares of an axis, 0 to 1.

    Args:
        low: Value at 0.
        high: Value at 1.
        logarithmic: Whether equal lengths are equal factors.
    """

    def __init__(self, low: float, high: float, logarithmic: bool = False) -> None:
        self.low, self.high, self.logarithmic = low, high, logarithmic

    def share(self, value: float) -> float:
        """Give the place of a value."""
        if self.high == self.low:
            return 0.5
        if self.logarithmic:
            return log10(value / self.low) / log10(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def draw(chart: Chart) -> dict[str, Any] | None:
    """Lay a chart out for the template; ``None`` where no curve has a point.

    Gives ``title``, ``unit``, ``x_label``, ``summary`` (in words, for who does not see it), ``x_ticks`` and
    ``y_ticks`` as (percent, label), ``curves`` (label, style, colour, SVG path), and ``data``, JSON for the tooltips.
    """
    shown = [series for series in chart.series if series.points]
    if not shown:
        return None
    x_axis, x_ticks = _x_axis(*(chart.x_range or find_x_range([chart])))
    y_axis, y_ticks = _y_axis([y for series in shown for _, y in series.points], chart.from_zero, chart.are_shares)
    curves = [_curve(series, x_axis, y_axis) for series in shown]
    axes = {"x": [x_axis.low, x_axis.high], "y": [y_axis.low, y_axis.high], "log": y_axis.logarithmic}
    named = [
        {"label": series.label, "colour": series.colour % 8, "points": thin(series.points)}
        for series in shown
        if series.style != "faint" or len(shown) == 1
    ]
    return {
        "title": chart.title,
        "unit": " · ".join(filter(None, [chart.unit, "log scale" if y_axis.logarithmic else ""])),
        "x_label": chart.x_label,
        "summary": " ".join(_describe(series) for series in shown if series.style != "faint"),
        "x_ticks": [(round(100 * x_axis.share(tick), 2), write_number(tick)) for tick in x_ticks],
        "y_ticks": [(round(100 - 100 * y_axis.share(tick), 2), write_number(tick)) for tick in y_ticks],
        "curves": curves,
        "data": json.dumps({**axes, "curves": named}, separators=(",", ":")),
    }


def find_x_range(charts: Sequence[Chart]) -> tuple[float, float]:
    """Give the first and the last x of all curves; a level has none."""
    curves = [series.points for chart in charts for series in chart.series if series.style != "limit"]
    values = [x for points in curves for x, _ in points]
    return min(values, default=0.0), max(values, default=0.0)


def _x_axis(low: float, high: float) -> tuple[Axis, list[float]]:
    ticks = [tick for tick in linear_ticks(low, high, 5) if low <= tick <= high and tick == int(tick)]
    return Axis(low, high), ticks or [low]


def _y_axis(values: Sequence[float], from_zero: bool, are_shares: bool) -> tuple[Axis, list[float]]:
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_FROM and not from_zero and not are_shares:
        low, high = low / _ROOM, high * _ROOM
        return Axis(low, high, logarithmic=True), log_ticks(low, high)
    ticks = linear_ticks(min(low, 0.0) if from_zero else low, max(high, 0.0) if from_zero else high)
    if are_shares:
        ticks = [tick for tick in ticks if 0 <= tick <= 1]  # the rest covers the values all the same
    return Axis(ticks[0], ticks[-1]), ticks


def _curve(series: Series, x_axis: Axis, y_axis: Axis) -> dict[str, Any]:
    points = series.points
    if series.style == "limit":
        points = [(x_axis.low, points[0][1]), (x_axis.high, points[0][1])]
    places = [f"{_SIDE * x_axis.share(x):.1f} {_SIDE * (1 - y_axis.share(y)):.1f}" for x, y in thin(points)]
    marked = series.style == "dots" or len(places) == 1
    return {
        "label": series.label,
        "style": series.style,
        "colour": series.colour % 8,
        "dash": series.colour // 8 % 3,
        "path": f"M{'L'.join(places)}",
        "dots": "".join(f"M{place}h0" for place in places) if marked else "",
    }


def _describe(series: Series) -> str:
    first, last = series.points[0][1], series.points[-1][1]
    if series.style == "limit" or len(series.points) == 1:
        return f"{series.label}: {write_number(first)}."
    values = [value for _, value in series.points]
    return (
        f"{series.label}: from {write_number(first)} to {write_number(last)}, "
        f"between {write_number(min(values))} and {write_number(max(values))}."
    )
