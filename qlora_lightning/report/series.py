"""Curves as plain numbers: smoothed, and thinned to what a drawing can show."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_lightning.report.metrics import Points

_MOST_POINTS = 600  # of a drawn curve: more than a chart has pixels for


@dataclass(frozen=True)
class Series:
    """One curve of a chart.

    Attributes:
        label: Its name in the legend.
        points: What is drawn.
        style: ``line``, ``faint`` (behind another one), ``dots`` (few points, each marked) or ``limit`` (a level).
        colour: Number of its colour; a second run has another one.
    """

    label: str
    points: Points
    style: str = "line"
    colour: int = 0


def running_mean(points: Points, width: int) -> Points:
    """Replace each value by the mean of the last ``width`` values up to it; the first ones have fewer."""
    sums = list(itertools.accumulate((value for _, value in points), initial=0.0))
    return [
        (x, (sums[number + 1] - sums[max(0, number + 1 - width)]) / min(width, number + 1))
        for number, (x, _) in enumerate(points)
    ]


def smoothing_width(count: int) -> int:
    """How many values to average of a curve of ``count``: a twentieth, from 5 to 100; 1 of a short one."""
    return 1 if count < 10 else min(100, max(5, count // 20))


def thin(points: Points, most: int = _MOST_POINTS) -> Points:
    """Keep first, lowest, highest and last of every stretch of a long curve, so that no peak is lost."""
    if len(points) <= most:
        return points
    length = -(-len(points) * 4 // most)
    return [kept for start in range(0, len(points), length) for kept in _outline(points[start : start + length])]


def _outline(stretch: Sequence[tuple[float, float]]) -> Points:
    numbers = range(len(stretch))
    lowest = min(numbers, key=lambda number: stretch[number][1])
    highest = max(numbers, key=lambda number: stretch[number][1])
    return [stretch[number] for number in sorted({0, lowest, highest, len(stretch) - 1})]
