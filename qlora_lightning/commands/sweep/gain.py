"""How much better one trial is than another on the same rows, and whether that is more than noise."""

from typing import NamedTuple

import numpy as np

from qlora_lightning.commands.sweep.row_losses import RowLosses

RESAMPLES = 10_000
_AT_ONCE = 500  # resamples whose row counts are in memory together


class Gain(NamedTuple):
    """By how much a loss is lower than another, in nats per labelled token.

    Attributes:
        value: On the rows themselves.
        low: Lower end of its 95 % confidence interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def pays(self, least: float) -> bool:
        """Whether it is above its noise, and no less than ``least``."""
        return self.low > 0 and self.value >= least


def measure_gain(before: RowLosses, after: RowLosses, seed: int = 0) -> Gain:
    """Compare two trials by a paired bootstrap over rows (Efron and Tibshirani 1993, chapter 13).

    Rows are drawn with replacement, the same ones for both; of each draw the difference of the two token-weighted
    losses is taken. The interval is that between the 2.5 % and the 97.5 % of these. It says what other validation rows
    would do, not what another seed of the training would.

    Args:
        before: Of the trial to beat.
        after: Of the other, on the same rows.
        seed: Of the draws: the same rows always give the same interval.
    """
    tokens = np.asarray(before.tokens, dtype=np.float64)  # (rows,)
    saved = np.asarray(before.nll) - np.asarray(after.nll)  # nats, (rows,)
    rows = len(tokens)
    draw = np.random.default_rng(seed)
    gains = []
    for begin in range(0, RESAMPLES, _AT_ONCE):
        counts = draw.multinomial(rows, np.full(rows, 1 / rows), size=min(_AT_ONCE, RESAMPLES - begin))
        gains.append(counts @ saved / (counts @ tokens))
    low, high = np.quantile(np.concatenate(gains), [0.025, 0.975])
    return Gain(float(saved.sum() / tokens.sum()), float(low), float(high))
