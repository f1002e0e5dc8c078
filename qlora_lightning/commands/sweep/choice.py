"""Which of the trials is chosen, and why: their losses compared row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qlora_lightning.commands.sweep import Dimension, show_value
from qlora_lightning.evaluation.comparison import resample_sums
from qlora_lightning.support.errors import UserError


@dataclass(frozen=True)
class RowLosses:
    """Losses of all validation rows, in their order.

    Attributes:
        nll: Summed negative log-likelihood of each row's labelled tokens, in nats.
        tokens: Labelled tokens of each row.
    """

    nll: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class Trial:
    """A training that has ended, judged on the validation rows.

    Attributes:
        name: Name of its folder.
        value: Value of the setting that the sweep varies.
        parameters: How many trained.
        steps: Optimizer steps.
        seconds: Duration of the training, if one process did all of it.
        validation: Hash of the validation samples, if the data module knows one.
        rows: Losses of the validation rows.
    """

    name: str
    value: Any
    parameters: int
    steps: int
    seconds: float | None
    validation: str | None
    rows: RowLosses

    @property
    def loss(self) -> float:
        """The mean over all labelled tokens of the validation rows, in nats."""
        return sum(self.rows.nll) / max(1, sum(self.rows.tokens))


class Gain(NamedTuple):
    """By how much a loss is lower than another, in nats per labelled token, with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def pays(self, least: float) -> bool:
        """Whether it is above its noise, and no less than ``least``."""
        return self.low > 0 and self.value >= least

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def measure_gain(before: RowLosses, after: RowLosses) -> Gain:
    """Compare the losses of a trial to those of the trial to beat, by a paired bootstrap over rows.

    Efron and Tibshirani 1993, chapter 13: of each draw of rows, the same for both, the difference of the two
    token-weighted losses is taken. The interval says what other validation rows would do, not what another seed of the
    training would.
    """
    columns = np.stack([np.subtract(before.nll, after.nll), np.asarray(before.tokens, dtype=float)], axis=1)
    saved, tokens = columns.sum(0)
    sums = resample_sums(columns)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return Gain(float(saved / tokens), float(low), float(high))


def check_same_rows(trials: Sequence[Trial]) -> None:
    """Refuse to compare losses on other validation rows."""
    first = trials[0]
    for trial in trials[1:]:
        known = first.validation is not None and trial.validation is not None
        if first.rows.tokens != trial.rows.tokens or (known and first.validation != trial.validation):
            raise UserError(
                f"{first.name} and {trial.name} were judged on different validation rows: the file has changed in "
                "between. Choose another folder by `--trainer.default_root_dir runs/NAME`, and sweep again."
            )


def is_done(dimension: Dimension, trials: Sequence[Trial], min_gain: float) -> bool:
    """Whether no further value needs to be tried."""
    if len(trials) == len(dimension.values):
        return True
    return dimension.stops and len(trials) > 1 and not measure_gain(trials[-2].rows, trials[-1].rows).pays(min_gain)


def choose(dimension: Dimension, trials: Sequence[Trial], min_gain: float) -> tuple[Trial, str]:
    """Choose a trial; return it, and why in a sentence or two.

    Of ranks, it is the last one that paid over the one before it. Of anything else, it is the one with the fewest
    parameters among those that the best does not beat by more than noise, and of equals the one of the lowest loss.

    Args:
        dimension: What was varied.
        trials: In the order of the dimension's values; at least one.
        min_gain: The least gain that counts, in nats per labelled token.
    """
    if dimension.stops:
        return _choose_rising(dimension, trials, min_gain)
    best = min(trials, key=lambda trial: trial.loss)
    near = [trial for trial in trials if trial is best or not measure_gain(trial.rows, best.rows).pays(min_gain)]
    chosen = min(near, key=lambda trial: (trial.parameters, trial.loss))
    if len(near) == 1:
        why = "It has the lowest loss, and each other is worse by more than noise."
    elif chosen is best:
        others = ", ".join(show_value(trial.value) for trial in near if trial is not chosen)
        why = f"It has the lowest loss; within noise of it: {others}."
    else:
        why = f"It has the fewest parameters of those within noise of the lowest loss, {show_value(best.value)}'s."
    return chosen, why


def _choose_rising(dimension: Dimension, trials: Sequence[Trial], min_gain: float) -> tuple[Trial, str]:
    last = trials[-1]
    if len(trials) < 2:
        return last, "Nothing was compared with it."
    gain = measure_gain(trials[-2].rows, last.rows)
    if gain.pays(min_gain):
        return last, f"Each {dimension.title} paid over the one before it: a larger one may pay too."
    name = f"{dimension.title} {show_value(last.value)}".capitalize()
    if gain.high < 0:
        lost = Gain(-gain.value, -gain.high, -gain.low)
        return trials[-2], f"{name} lost {lost} nats per token: more than noise."
    why = "no more than noise" if gain.low <= 0 else f"less than --min-gain {min_gain:g}"
    return trials[-2], f"{name} gained {gain} nats per token over it: {why}."
