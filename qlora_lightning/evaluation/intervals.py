"""Means with confidence intervals and paired differences, computed and formatted. Needs no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 2_000
SEED = 0
PREFERENCE_ACCURACY = "preference_accuracy"
# Metrics for which each row counts as 0 or 1.
_YES_OR_NO = (PREFERENCE_ACCURACY, "exact_match", "json_valid", "numeric_match", "stop_rate")
_NO_WIDTH = 1e-9  # rounding differences of sums of equal rows
MOST = 1e100  # of what is read from a file: means and differences of larger numbers overflow
_Z = 1.959964  # quantile of the normal distribution, two-sided 95 %
Floats = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """A value, and its range with a confidence of 95 %."""

    value: float
    low: float
    high: float


class Metric(NamedTuple):
    """One metric of all sides, and the difference of each other side from the first, on the same rows."""

    sides: dict[str, Interval]
    differences: dict[str, Interval]


def measure(name: str, rows: Mapping[str, Sequence[tuple[float, float]]]) -> Metric:
    """Compute one metric of each side: the ratio of the sums of its rows' numerators and denominators."""
    table = np.array(list(rows.values()), dtype=np.float64)  # (sides, rows, 2)
    n_rows, totals = table.shape[1], table.sum(1)
    values, resampled = _ratios(name, totals), _ratios(name, _resample_sums(table))
    sides, differences = {}, {}
    for index, side in enumerate(rows):
        if name in _YES_OR_NO and totals[index, 1]:
            sides[side] = wilson_interval(values[index] * n_rows, n_rows)
        else:
            sides[side] = percentile_interval(values[index], resampled[:, index])
        if index:
            with np.errstate(invalid="ignore"):  # infinite minus infinite
                gain, resampled_gain = values[index] - values[0], resampled[:, index] - resampled[:, 0]
            differences[side] = percentile_interval(gain, resampled_gain)
    return Metric(sides, differences)


def _ratios(name: str, sums: Floats) -> Floats:
    with np.errstate(all="ignore"):  # no tokens: NaN; a hopeless model's perplexity: infinite
        means: Floats = sums[..., 0] / sums[..., 1]
        return np.exp(means) if name == "perplexity" else means


def _resample_sums(table: Floats) -> Floats:
    """Sum over rows drawn with replacement, the same rows for all sides (Efron 1979).

    ``table`` is ``(sides, rows, columns)``, the result ``(RESAMPLES, sides, columns)``.
    """
    generator, n_rows = np.random.default_rng(SEED), table.shape[1]
    return np.stack([table[:, generator.integers(0, n_rows, n_rows)].sum(1) for _ in range(RESAMPLES)])


def percentile_interval(value: float, resampled: Floats) -> Interval:
    """Return a value with the middle 95 % of its resamples.

    If all rows are equal, every resample is too, which tells nothing of other rows: the ends are NaN.
    """
    with np.errstate(invalid="ignore"):  # between infinities there is nothing to interpolate
        low, high = np.percentile(resampled, [2.5, 97.5]).tolist()
    if high - low <= _NO_WIDTH * max(1.0, abs(value)):
        low = high = math.nan
    return Interval(float(value), float(low), float(high))


def wilson_interval(hits: float, n_rows: int) -> Interval:
    """Return a share of rows with Wilson's interval (1927): unlike a bootstrap, it allows for luck in 100 of 100."""
    share, z2 = float(hits) / n_rows, _Z * _Z
    center = (share + z2 / (2 * n_rows)) / (1 + z2 / n_rows)
    half_width = _Z / (1 + z2 / n_rows) * math.sqrt(share * (1 - share) / n_rows + z2 / (4 * n_rows * n_rows))
    # Rounding may put the ends beyond 0, 1 or the share itself.
    return Interval(share, max(0.0, min(center - half_width, share)), min(1.0, max(center + half_width, share)))


# ---- formatted -------------------------------------------------------------------------------------------------------


def plain_interval(interval: Interval) -> dict[str, float | None]:
    """Return ``{value, low, high}`` for JSON, which has no NaN: ``None``."""
    return {name: value if math.isfinite(value) else None for name, value in interval._asdict().items()}


def read_interval(plain: Mapping[str, float | None]) -> Interval:
    """Return the interval of such a mapping; what it lacks, or is beyond 1e100, is NaN."""
    values = [plain.get(name) for name in Interval._fields]
    return Interval(*(math.nan if value is None or abs(value) > MOST else value for value in values))


def choose_digits(intervals: Sequence[Interval]) -> int:
    """Return how many decimals show the smallest of some values that are not shares."""
    sizes = [abs(interval.value) for interval in intervals if interval.value and math.isfinite(interval.value)]
    smallest = min(sizes, default=1.0)
    return 1 if smallest >= 10 else 3 if smallest >= 0.1 else 4


def format_interval(interval: Interval, percent: bool, sign: str, digits: int) -> str:
    """Format ``98.0 % [93.0, 99.4]``, or ``2.098 [2.010, 2.201]`` with ``digits`` decimals.

    ``sign`` is ``+`` for a difference.
    """
    if math.isnan(interval.value):
        return "–"
    factor, digits = (100, 1) if percent else (1, digits)
    value, low, high = (round(number * factor, digits) + 0.0 for number in interval)  # + 0.0: no -0.0
    unit = " %" if percent and not sign else ""
    bounds = "" if math.isnan(low) else f" [{low:,.{digits}f}, {high:,.{digits}f}]"
    return f"{value:{sign},.{digits}f}{unit}{bounds}"
