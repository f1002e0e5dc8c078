"""Base and adapters on the same rows: means with intervals, paired differences, wins and losses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qlora_lightning.evaluation.bootstrap import Floats, Interval, percentile_interval, resample_sums, wilson_interval
from qlora_lightning.evaluation.scores import Judgement

BASE = "base"
Judged = Mapping[str, Sequence[Judgement]]  # by side, of the same rows in the same order


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
    """Compare an adapter with the base row by row, by a score or, where there is none, by the loss."""
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
    """Give the places of rows, the lowest score first; of the same score, the highest loss."""

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
