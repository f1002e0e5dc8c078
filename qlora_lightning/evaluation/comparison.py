"""Base and adapters on the same rows: means with confidence intervals, paired differences, wins and losses."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qlora_lightning.evaluation.scores import is_share

BASE = "base"
RESAMPLES = 2_000
SEED = 0
METHOD = (
    f"95 % intervals by the percentile bootstrap over rows ({RESAMPLES:,} resamples, seed {SEED}), differences on the "
    "same resamples; of a share of rows alone by Wilson's score interval; if all rows are alike, by how many others "
    "may then be otherwise (Wilson), and none of what has no bounds, as a loss"
)
PREFERENCE = "preference_accuracy"
_YES_OR_NO = (PREFERENCE, "exact_match", "json_valid", "numeric_match", "stop_rate")  # each row counts as 0 or 1
_NO_WIDTH = 1e-9  # what sums of equal rows differ by in rounding
_Z = 1.959964  # of the normal distribution, two-sided 95 %
Floats = npt.NDArray[np.float64]


class Answer(NamedTuple):
    """What a model answered to a prompt.

    Attributes:
        text: Without control tokens and space around it.
        tokens: How many they are.
        stopped: Whether it ended with a stop token.
        scores: By name, the one that counts most first.
    """

    text: str
    tokens: int
    stopped: bool
    scores: dict[str, float]

    @property
    def figures(self) -> dict[str, float]:
        """All that is averaged over answers."""
        return {**self.scores, "stop_rate": float(self.stopped), "answer_tokens": float(self.tokens)}


class RowResult(NamedTuple):
    """Loss and answer of one row.

    Attributes:
        nll: Sum of the loss over its labelled tokens, in nats.
        labelled_tokens: How many they are.
        correct: Of how many the label was the most likely token; of two answers to compare, which count as one token,
            whether the chosen one is the likelier.
        answer: ``None`` if the row was not answered.
    """

    nll: float
    labelled_tokens: int
    correct: int
    answer: Answer | None = None

    @property
    def loss(self) -> float:
        """Nats per labelled token; NaN if none is labelled."""
        return self.nll / self.labelled_tokens if self.labelled_tokens else math.nan


Results = Mapping[str, Sequence[RowResult]]
"""By side, the base first: the same rows in the same order."""


class Interval(NamedTuple):
    """A value, and its range with a confidence of 95 %."""

    value: float
    low: float
    high: float


class Metric(NamedTuple):
    """One metric of all sides, and of each but the first its difference from the first, on the same rows."""

    sides: dict[str, Interval]
    differences: dict[str, Interval]


def compare(results: Results, pairs: bool = False) -> dict[str, Metric]:
    """Compute every metric of every side by its name: losses over all rows, scores over those that were answered.

    ``pairs``: whether rows are two answers to compare.
    """
    nll = {side: [(row.nll, row.labelled_tokens) for row in rows] for side, rows in results.items()}
    correct = {side: [(row.correct, row.labelled_tokens) for row in rows] for side, rows in results.items()}
    found = {name: measure(name, nll) for name in (("loss",) if pairs else ("loss", "perplexity"))}
    accuracy = PREFERENCE if pairs else "token_accuracy"
    found[accuracy] = measure(accuracy, correct)
    figures = {side: [row.answer.figures for row in rows if row.answer is not None] for side, rows in results.items()}
    names = next(iter(next(iter(figures.values()))), {})
    for name in names:
        found[name] = measure(name, {side: [(each[name], 1.0) for each in rows] for side, rows in figures.items()})
    return found


def measure(name: str, rows: Mapping[str, Sequence[tuple[float, float]]]) -> Metric:
    """Compute one metric.

    Args:
        name: Of the metric.
        rows: By side, numerator and denominator of each row: the metric is the ratio of their sums.
    """
    table = np.array(list(rows.values()), dtype=np.float64)  # (sides, rows, 2)
    count = table.shape[1]
    totals = table.sum(1)
    values, drawn = _ratios(name, totals), _ratios(name, resample_sums(table))
    percent, sides, differences = is_share(name), {}, {}
    for place, side in enumerate(rows):
        if name in _YES_OR_NO:
            sides[side] = wilson_interval(totals[place, 0], count)
        else:
            sides[side] = percentile_interval(values[place], drawn[:, place], count, (0.0, 1.0) if percent else None)
        if place:
            with np.errstate(invalid="ignore"):  # infinite minus infinite
                value, gains = values[place] - values[0], drawn[:, place] - drawn[:, 0]
            differences[side] = percentile_interval(value, gains, count, (-1.0, 1.0) if percent else None)
    return Metric(sides, differences)


def _ratios(name: str, sums: Floats) -> Floats:
    with np.errstate(all="ignore"):  # of no tokens a mean is NaN, and the perplexity of a hopeless model infinite
        means: Floats = sums[..., 0] / sums[..., 1]
        return np.exp(means) if name == "perplexity" else means


def resample_sums(table: Floats) -> Floats:
    """Sum over rows drawn with replacement, the same rows for all sides (Efron 1979).

    Args:
        table: ``(sides, rows, columns)``.

    Returns:
        ``(RESAMPLES, sides, columns)``.
    """
    generator, rows = np.random.default_rng(SEED), table.shape[1]
    return np.stack([table[:, generator.integers(0, rows, rows)].sum(1) for _ in range(RESAMPLES)])


def percentile_interval(
    value: float, resampled: Floats, rows: int, bounds: tuple[float, float] | None = None
) -> Interval:
    """Return a value with the middle 95 % of what resamples give for it.

    Rows that are all alike give a bootstrap nothing to draw from, and an interval without width, as if the value were
    certain. Then at most so large a share of all rows is otherwise as Wilson's interval has for none of ``rows``, and
    these are at the worst on a bound; without bounds there is no interval: NaN.

    Args:
        value: Of all rows.
        resampled: Of each resample.
        rows: How many there are.
        bounds: Least and largest value of a row.
    """
    with np.errstate(invalid="ignore"):  # between infinities there is nothing to interpolate
        low, high = np.percentile(resampled, [2.5, 97.5]).tolist()
    if high - low <= _NO_WIDTH * max(1.0, abs(value)):
        if bounds is None:
            return Interval(float(value), math.nan, math.nan)
        others = wilson_interval(0, rows).high
        low, high = value - others * (value - bounds[0]), value + others * (bounds[1] - value)
    return Interval(float(value), float(low), float(high))


def wilson_interval(hits: float, rows: int) -> Interval:
    """Return a share of rows with Wilson's interval (1927): unlike a bootstrap, it allows for luck in 100 of 100."""
    share, z2 = float(hits) / rows, _Z * _Z
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    reach = _Z / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows * rows))
    # Rounded, the ends may be beyond 0, 1 or the share itself.
    return Interval(share, max(0.0, min(middle - reach, share)), min(1.0, max(middle + reach, share)))
