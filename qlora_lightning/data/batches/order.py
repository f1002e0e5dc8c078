"""The order of an epoch's rows, mixed by weight or grouped by length, and which of them each rank takes."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from qlora_lightning.support.errors import UserError


class RankBatch(NamedTuple):
    """The rows of one micro-batch on one rank; a filler's row is only there to be run, its labels count nothing."""

    rows: list[int]
    filler: bool


def permute(n: int, *key: int | str) -> npt.NDArray[np.int64]:
    """Return a permutation of ``range(n)``, ``(n,)``: a pure function of its arguments, drawn from no global generator.

    Args:
        n: how many.
        key: what tells this permutation from all others: the seed, the epoch, what is permuted.
    """
    # Hashed rather than added: seed 1 in epoch 2 must not repeat seed 2 in epoch 1.
    digest = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    permutation: npt.NDArray[np.int64] = torch.randperm(n, generator=generator).numpy()
    return permutation


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Return the order of an epoch that takes each of ``n`` rows once."""
    order: list[int] = permute(n, seed, epoch).tolist()
    return order


def count_batches(n: int, batch_size: int, world_size: int) -> int:
    """Return how many micro-batches every rank has in an epoch of ``n`` rows."""
    return -(-n // (batch_size * world_size))


def rank_batches(order: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[RankBatch]:
    """Cut an order into micro-batches and return those of one rank.

    Micro-batch i of all ranks together is rows ``[i*b*w, (i+1)*b*w)``, so a window of the optimizer holds the same rows
    however many ranks share them. In a short last one the ranks share what is left, the first ones taking a row more; a
    rank that gets none runs a filler, so that every rank has the same number of micro-batches.
    """
    stride = batch_size * world_size
    batches = []
    for begin in range(0, len(order), stride):
        rows = order[begin : begin + stride]
        each, more = divmod(len(rows), world_size)
        first = rank * each + min(rank, more)
        mine = list(rows[first : first + each + (rank < more)])
        batches.append(RankBatch(mine or [rows[0]], not mine))
    return batches


def rank_bins(bins: Sequence[list[int]], rank: int, world_size: int) -> list[RankBatch]:
    """Return the bins of one rank, each a micro-batch: bin ``i*w + rank`` is its i-th.

    Where the last bins do not reach to all ranks, those without one run a filler.
    """
    batches = []
    for begin in range(0, len(bins), world_size):
        mine = begin + rank < len(bins)
        batches.append(RankBatch(bins[begin + rank] if mine else bins[begin][:1], not mine))
    return batches


def check_weights(source: npt.NDArray[np.int32], weights: Sequence[float]) -> None:
    """Refuse a weight of a source that has no row.

    Args:
        source: which source each row came from, ``(n,)``.
        weights: of each source.

    Raises:
        UserError: if there is one.
    """
    rows = np.bincount(source, minlength=len(weights))
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
    """
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


_BATCHES_SORTED_TOGETHER = 50  # more: lengths more alike; fewer: an order more random


def group_by_length(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], stride: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Reorder an epoch so that each ``stride`` rows, from the first on, are of like length.

    A shuffled order is sorted by length in stretches of about 50 batches, then the batches are shuffled. The batch with
    the longest row comes first, so that memory runs out in the first step or never; a short batch stays last.

    Args:
        order: the rows of the epoch, shuffled, ``(n,)``.
        lengths: tokens of every row.
        stride: rows in a micro-batch of all ranks together.
        seed: of the order of the batches.
        epoch: of the order of the batches.

    Returns:
        The same rows, ``(n,)``.
    """
    full = len(order) // stride
    stretch = _BATCHES_SORTED_TOGETHER * stride
    # The last stretch takes what is left over, so that its short batch never stands alone and never holds the longest.
    borders = np.arange(1, full // _BATCHES_SORTED_TOGETHER) * stretch
    parts = np.split(order, borders)
    falling = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    batches, rest = falling[: full * stride].reshape(full, stride), falling[full * stride :]
    if not full:
        return rest
    batches = batches[permute(full, seed, epoch, "groups")]
    first = int(np.argmax(lengths[batches].max(axis=1)))
    batches[[0, first]] = batches[[first, 0]]
    return np.concatenate([batches.ravel(), rest])
