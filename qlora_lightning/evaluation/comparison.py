"""Base and adapters on the same rows: means with confidence intervals, paired differences, wins and losses."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qlora_lightning.evaluation.scores import Judgement

BASE = "base"
Judged = Mapping[str, Sequence[Judgement]]  # by side, of the same rows in the same order
RESAMPLES = 2_000
SEED = 0
METHOD = (
    f"95 % intervals by the percentile bootstrap over rows ({RESAMPLES:,} resamples, seed {SEED}), differences on the "
    "same resamples; of a share of rows alone by Wilson's score interval; if all rows are alike, by how many others "
    "may then be otherwise (Wilson), and none of what has no bounds, as a loss"
)
_CHUNK = 200  # resamples at a time
_NO_WIDTH = 1e-9  # what sums of equal rows differ by in rounding
_Z = 1.959964  # of the normal distribution, two-sided 95 %
Floats = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """A value, and its range with a confidence of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Metric:
    """A figure that is a ratio of two sums over rows, or a function of it.

    Attributes:
        parts: Numerator and denominator of a row.
        percent: Whether it is a share, from 0 to 1, shown in percent.
        shape: Applied to the ratio.
        binary: Whether each row counts as 0 or 1.
    """

    parts: Callable[[Judgement], tuple[float, float]]
    percent: bool = False
    shape: Callable[[Floats], Floats] = lambda ratio: ratio
    binary: bool = False


@dataclass(frozen=True)
class Measured:
    """One metric of all sides.

    Attributes:
        percent: Whether it is shown in percent.
        sides: By name, ``base`` among them.
        differences: By adapter: adapter minus base, on the same rows.
    """

    percent: bool
    sides: dict[str, Interval]
    differences: dict[str, Interval]


class Part(NamedTuple):
    """What was measured on some of the rows: a data set, or a group.

    Attributes:
        rows: How many they are.
        answered: How many of them were answered.
        measured: By metric.
    """

    rows: int
    answered: int
    measured: dict[str, Measured]


@dataclass(frozen=True)
class Duel:
    """How an adapter did against the base, row by row.

    Attributes:
        score: By which.
        wins: Places of the rows in which the adapter is better.
        losses: In which the base is.
        ties: How many are alike.
    """

    score: str
    wins: list[int]
    losses: list[int]
    ties: int


def compare(judged: Judged, scores: Sequence[str]) -> dict[str, Measured]:
    """Measure every metric of every side, losses over all rows and scores over those that were answered.

    Args:
        judged: Of base and adapters.
        scores: Names of the scores.
    """
    with_answer = [place for place, first in enumerate(judged[BASE]) if first.answer is not None]
    answered = {side: [judgements[place] for place in with_answer] for side, judgements in judged.items()}
    found = _measure(judged, _loss_metrics())
    return found | (_measure(answered, _answer_metrics(scores)) if with_answer else {})


def duel(base: Sequence[Judgement], adapter: Sequence[Judgement], score: str | None) -> Duel:
    """Compare an adapter with the base row by row, by a score or, if there is none, by the loss."""
    wins, losses, ties = list[int](), list[int](), 0
    for place, (before, after) in enumerate(zip(base, adapter, strict=True)):
        if score is not None and before.answer is None:
            continue
        gain = before.loss - after.loss if score is None else after.scores[score] - before.scores[score]
        if gain:
            (wins if gain > 0 else losses).append(place)
        else:
            ties += 1
    return Duel(score or "loss", wins, losses, ties)


def hardest_first(judgements: Sequence[Judgement], score: str | None) -> list[int]:
    """Return the places of rows, the lowest score first; of the same score, the highest loss."""

    def key(place: int) -> tuple[float, float]:
        judgement = judgements[place]
        return judgement.scores.get(score or "", 1.0), -judgement.loss

    return sorted(range(len(judgements)), key=key)


def _loss_metrics() -> dict[str, Metric]:
    def loss(judgement: Judgement) -> tuple[float, float]:
        return judgement.nll, judgement.labelled_tokens

    return {
        "loss": Metric(loss),
        "perplexity": Metric(loss, shape=np.exp),
        "token_accuracy": Metric(lambda each: (each.correct, each.labelled_tokens), percent=True),
    }


def _answer_metrics(scores: Sequence[str]) -> dict[str, Metric]:
    def of(score: str) -> Metric:
        binary = score in ("exact_match", "json_valid", "numeric_match")
        return Metric(lambda each: (each.scores[score], 1.0), percent=True, binary=binary)

    return {score: of(score) for score in scores} | {
        "stop_rate": Metric(lambda each: (float(each.stopped), 1.0), percent=True, binary=True),
        "answer_tokens": Metric(lambda each: (float(each.answer_tokens), 1.0)),
    }


def _measure(judged: Judged, metrics: Mapping[str, Metric]) -> dict[str, Measured]:
    sides = list(judged)
    columns = [
        np.array([metric.parts(each) for each in judged[side]], dtype=np.float64).reshape(-1, 2)
        for metric in metrics.values()
        for side in sides
    ]
    table = np.concatenate(columns, axis=1)  # (rows, metrics · sides · 2)
    shape = (-1, len(metrics), len(sides), 2)
    totals, resampled = table.sum(0).reshape(shape)[0], resample_sums(table).reshape(shape)
    found = {}
    for number, (name, metric) in enumerate(metrics.items()):
        values = _shaped(metric, totals[number])  # (sides,)
        drawn = _shaped(metric, resampled[:, number])  # (resamples, sides)
        found[name] = Measured(
            metric.percent,
            {
                side: _interval(metric, values, drawn, totals[number], place, len(table))
                for place, side in enumerate(sides)
            },
            {
                side: _difference(metric, values, drawn, place, len(table))
                for place, side in enumerate(sides)
                if side != BASE
            },
        )
    return found


def _interval(metric: Metric, values: Floats, drawn: Floats, totals: Floats, side: int, rows: int) -> Interval:
    if metric.binary:
        return wilson_interval(float(totals[side, 0]), int(totals[side, 1]))
    return percentile_interval(float(values[side]), drawn[:, side], rows, (0.0, 1.0) if metric.percent else None)


def _difference(metric: Metric, values: Floats, drawn: Floats, side: int, rows: int) -> Interval:
    with np.errstate(invalid="ignore"):  # infinite minus infinite
        gains = drawn[:, side] - drawn[:, 0]
        value = float(values[side] - values[0])
    return percentile_interval(value, gains, rows, (-1.0, 1.0) if metric.percent else None)


def _shaped(metric: Metric, sums: Floats) -> Floats:
    with np.errstate(all="ignore"):  # of no tokens a mean is NaN, and the perplexity of a hopeless model infinite
        return metric.shape(sums[..., 0] / sums[..., 1])


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
    """Return a value with the middle 95 % of what resamples give for it; NaN without rows.

    Rows that are all alike give a bootstrap nothing to draw from, and an interval without width, as if the value were
    certain. There :func:`alike_interval` takes its place, and of a value without bounds there is none: NaN.

    Args:
        value: Of all rows.
        resampled: Of each resample.
        rows: How many there are.
        bounds: Least and largest value of a row.
    """
    if not len(resampled) or np.isnan(resampled).all():
        return Interval(value, math.nan, math.nan)
    with np.errstate(invalid="ignore"):  # between infinities there is nothing to interpolate
        low, high = np.nanpercentile(resampled, [2.5, 97.5]).tolist()
    if high - low <= _NO_WIDTH * max(1.0, abs(value)):
        return Interval(value, math.nan, math.nan) if bounds is None else alike_interval(value, rows, bounds)
    return Interval(value, low, high)


def alike_interval(value: float, rows: int, bounds: tuple[float, float]) -> Interval:
    """Return the range of a mean if all rows that were seen have the same value.

    At most so large a share of all rows is otherwise as Wilson's interval has for none of ``rows``, and these are at
    the worst on a bound.
    """
    otherwise = wilson_interval(0, rows).high
    low, high = bounds
    return Interval(value, value - otherwise * (value - low), value + otherwise * (high - value))


def wilson_interval(hits: float, rows: int) -> Interval:
    """Return a share of rows with Wilson's interval (1927): unlike a bootstrap, it allows for luck in 100 of 100."""
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
