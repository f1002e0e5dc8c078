"""Lengths as plain numbers: percentiles and a histogram."""

from typing import Any, NamedTuple

import numpy as np

PERCENTILES = {"min": 0, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100}


class Bar(NamedTuple):
    """Samples of ``low`` to ``high`` tokens, both included; ``high`` is None in an open last bar."""

    low: int
    high: int | None
    samples: int

    @property
    def label(self) -> str:
        """The bar's range in words."""
        if self.high is None:
            return f"{self.low:,} and more"
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


def percentiles(values: Any) -> dict[str, int]:
    """Return minimum, quantiles and maximum of ``(N,)`` whole numbers, each one that occurs; nothing if N is 0."""
    if not len(values):
        return {}
    found = np.percentile(values, list(PERCENTILES.values()), method="inverted_cdf")
    return dict(zip(PERCENTILES, map(int, found), strict=True))


def histogram(values: Any, most_bars: int = 12) -> list[Bar]:
    """Count ``(N,)`` whole numbers in bars of one round width; none if N is 0.

    Args:
        values: lengths in tokens.
        most_bars: about how many bars at most. What lies far beyond the 99th percentile is one open bar at the end:
            a single long row must not flatten the others.
    """
    if not len(values):
        return []
    low, bulk, high = int(min(values)), int(percentiles(values)["99 %"]), int(max(values))
    width = _round_width((bulk - low + 1) / (most_bars - 1))
    first = low // width * width
    closed = (high - first) // width + 1
    is_open = closed > most_bars
    if is_open:
        closed = (bulk - first) // width + 1
    edges = [first + number * width for number in range(closed + 1)]
    counts = np.histogram(np.minimum(values, edges[-1]), [*edges, edges[-1] + 1])[0].tolist()
    bars = [Bar(edge, edge + width - 1, count) for edge, count in zip(edges, counts[:closed], strict=False)]
    return [*bars, Bar(edges[-1], None, counts[-1])] if is_open else bars


def _round_width(least: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, … that is not below ``least``."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step >= least:
                return factor * step
        step *= 10
