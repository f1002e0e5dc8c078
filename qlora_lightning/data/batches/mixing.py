"""Sources mixed by weight: which rows an epoch takes, and how often."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qlora_lightning.data.batches.order import permute
from qlora_lightning.support.errors import UserError


def check_weights(source: npt.NDArray[np.int32], weights: Sequence[float]) -> None:
    """Refuse weights that cannot be kept.

    Args:
        source: which source each row came from, ``(n,)``.
        weights: of each source.

    Raises:
        UserError: if a weight is not above 0, or a source has no row or no weight.
    """
    if any(not 0 < weight < float("inf") for weight in weights):
        raise UserError(f"weight: expected numbers above 0, found {', '.join(map(str, weights))}.")
    rows = np.bincount(source, minlength=len(weights))
    if len(rows) > len(weights):
        raise UserError(f"weight: expected one for each of {len(rows)} sources, found {len(weights)}.")
    if not rows.all():
        raise UserError(
            f"weight: source {int(rows.argmin()) + 1} has no usable row, so it cannot have its share: leave it out."
        )


def share_out(weights: Sequence[float], n: int) -> list[int]:
    """Share ``n`` rows among sources in proportion to weights; largest remainders are rounded up: they sum to n."""
    exact = np.array(weights) / np.sum(weights) * n
    shares = np.floor(exact).astype(np.int64)
    largest = np.argsort(shares - exact, kind="stable")  # of equal remainders, the first source's
    shares[largest[: n - int(shares.sum())]] += 1
    return [int(share) for share in shares]


def mix_sources(
    source: npt.NDArray[np.int32], weights: Sequence[float], seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Return the shuffled rows of an epoch in which each source has its share.

    An epoch has as many rows as there are, over all sources. Each source is an endless line of permutations of its
    rows, from which every epoch takes the next stretch: within a source every row is seen before any is seen again,
    over epochs too. So a source with a small weight takes several epochs to be seen whole, and one with a large weight
    is seen several times in one. A pure function of its arguments: no epoch needs the ones before it.

    Args:
        source: which source each row came from, ``(n,)``.
        weights: of each source.
        seed: of the permutations.
        epoch: from 0.

    Returns:
        Rows, ``(n,)``; one can occur several times.

    Raises:
        UserError: as ``check_weights``.
    """
    check_weights(source, weights)
    n = len(source)
    taken = [
        _take(np.flatnonzero(source == number), share * epoch, share, seed, number)
        for number, share in enumerate(share_out(weights, n))
    ]
    return np.concatenate(taken)[permute(n, seed, epoch)]


def _take(rows: npt.NDArray[np.int64], begin: int, count: int, seed: int, number: int) -> npt.NDArray[np.int64]:
    """Return places ``[begin, begin + count)`` of a source's endless line."""
    rounds = range(begin // len(rows), -(-(begin + count) // len(rows)))
    line = [rows[permute(len(rows), seed, "source", number, turn)] for turn in rounds]
    start = begin % len(rows)
    return np.concatenate([rows[:0], *line])[start : start + count]
