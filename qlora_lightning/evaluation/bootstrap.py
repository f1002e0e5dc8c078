"""Confidence intervals of means over rows, and of differences between two models on the same rows."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 2_000
SEED = 0
METHOD = (
    f"95 % intervals by the percentile bootstrap over rows ({RESAMPLES:,} resamples, seed {SEED}), differences on the "
    "same resamples; of a share of rows alone by Wilson's score interval; where all rows are alike, by how many others "
    "may then be otherwise (Wilson), and none of what has no bounds, as a loss"
)
_CHUNK = 200  # resamples at a time
_NO_WIDTH = 1e-9  # what sums of equal rows differ by in rounding
_Z = 1.959964  # of the normal distribution, two-sided 95 %
Floats = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """A value, and where it lies with a confidence of 95 %."""

    value: float
    low: float
    high: float


def resample_sums(columns: Floats) -> Floats:
    """Sum columns over rows drawn with replacement, the same rows for all columns (Efron 1979).

    Args:
        columns: ``(rows, columns)``.

    Returns:
        ``(RESAMPLES, columns)``.
    """
    return np.concatenate([counts @ columns for counts in _draw(len(columns))])


def percentile_interval(
    value: float, resampled: Floats, rows: int, bounds: tuple[float, float] | None = None
) -> Interval:
    """Give a value with the middle 95 % of what resamples give for it; NaN where there is no row.

    Rows that are all alike give a bootstrap nothing to draw from, and an interval without width, as if the value were
    certain. There :func:`alike_interval` takes its place, and of a value without bounds there is none: NaN.

    Args:
        value: Of all rows.
        resampled: Of each resample.
        rows: How many there are.
        bounds: Between which a row's value lies.
    """
    if not len(resampled) or np.isnan(resampled).all():
        return Interval(value, math.nan, math.nan)
    with np.errstate(invalid="ignore"):  # between infinities there is nothing to interpolate
        low, high = np.nanpercentile(resampled, [2.5, 97.5]).tolist()
    if high - low <= _NO_WIDTH * max(1.0, abs(value)):
        return Interval(value, math.nan, math.nan) if bounds is None else alike_interval(value, rows, bounds)
    return Interval(value, low, high)


def alike_interval(value: float, rows: int, bounds: tuple[float, float]) -> Interval:
    """Give where a mean may lie when all rows that were seen have the same value.

    At most so large a share of all rows is otherwise as Wilson's interval has for none of ``rows``, and these lie at
    the worst on a bound.
    """
    otherwise = wilson_interval(0, rows).high
    low, high = bounds
    return Interval(value, value - otherwise * (value - low), value + otherwise * (high - value))


def wilson_interval(hits: float, rows: int) -> Interval:
    """Give a share of rows with Wilson's interval (1927): unlike a bootstrap, it knows that 100 of 100 may be luck."""
    if not rows:
        return Interval(math.nan, math.nan, math.nan)
    share, z2 = hits / rows, _Z * _Z
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    reach = _Z / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows * rows))
    # Rounded, the ends may lie beyond 0, 1 or the share itself.
    return Interval(share, max(0.0, min(middle - reach, share)), min(1.0, max(middle + reach, share)))


def _draw(rows: int) -> Iterator[Floats]:
    """Yield how often each resample holds each row, ``(resamples, rows)``."""
    generator = np.random.default_rng(SEED)
    for start in range(0, RESAMPLES, _CHUNK):
        size = min(_CHUNK, RESAMPLES - start)
        if rows:
            drawn = generator.integers(0, rows, (size, rows)) + np.arange(size)[:, None] * rows
            yield np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows).astype(np.float64)
        else:
            yield np.zeros((size, 0))
