"""The order of an epoch's rows, mixed by weight or packed, and which of them each rank takes."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class RankBatch(NamedTuple):
    """The rows of one batch on one rank; a filler's row is only there to be run, its labels count nothing."""

    rows: list[int]
    filler: bool


def permute(n: int, *key: int | str) -> npt.NDArray[np.int64]:
    """Return a permutation of ``range(n)``, ``(n,)``, drawn from no global generator.

    It is a pure function of its arguments: the key (seed, epoch, what is permuted) tells it from all others.
    """
    # Hashed rather than added: seed 1 in epoch 2 must not repeat seed 2 in epoch 1.
    digest = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    permutation: npt.NDArray[np.int64] = torch.randperm(n, generator=generator).numpy()
    return permutation


def count_batches(n: int, batch_size: int, world_size: int) -> int:
    """Return how many batches every rank has in an epoch of ``n`` rows."""
    return -(-n // (batch_size * world_size))


def rank_batches(order: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[RankBatch]:
    """Cut an order into batches and return those of one rank.

    Batch i of all ranks together is rows ``[i*b*w, (i+1)*b*w)``, so a window of the optimizer holds the same rows
    however many ranks share them. In a short last one the ranks share what is left, the first ones taking a row more; a
    rank that gets none runs a filler, so that every rank has the same number of batches.
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
    """Return the bins of one rank, each a batch: bin ``i*w + rank`` is its i-th.

    Where the last bins do not reach to all ranks, those without one run a filler.
    """
    batches = []
    for begin in range(0, len(bins), world_size):
        mine = begin + rank < len(bins)
        batches.append(RankBatch(bins[begin + rank] if mine else bins[begin][:1], not mine))
    return batches


def share_out(shares: Sequence[float], n: int) -> list[int]:
    """Divide ``n`` rows among sources in proportion; largest remainders are rounded up, so that they sum to n."""
    exact = np.array(shares) / np.sum(shares) * n
    rows = np.floor(exact).astype(np.int64)
    largest = np.argsort(rows - exact, kind="stable")  # of equal remainders, the first source's
    rows[largest[: n - int(rows.sum())]] += 1
    return [int(count) for count in rows]


def mix_sources(source: npt.NDArray[np.int32], shares: Sequence[float], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the shuffled rows of an epoch in which each source has its share.

    An epoch has as many rows as there are, over all sources. Each source is an endless line of permutations of its
    rows, from which every epoch takes the next stretch: within a source every row is seen before any is seen again,
    over epochs too. So a source with a small share takes several epochs to be seen whole, and one with a large share
    is seen several times in one. A pure function of its arguments: no epoch needs the ones before it.

    Args:
        source: which source each row came from, ``(n,)``.
        shares: of each source, in any unit.
        seed: of the permutations.
        epoch: from 0.

    Returns:
        Rows, ``(n,)``; one can occur several times.
    """
    n = len(source)
    taken = [
        _take(np.flatnonzero(source == number), count * epoch, count, seed, number)
        for number, count in enumerate(share_out(shares, n))
    ]
    return np.concatenate(taken)[permute(n, seed, epoch)]


def _take(rows: npt.NDArray[np.int64], begin: int, count: int, seed: int, number: int) -> npt.NDArray[np.int64]:
    """Return places ``[begin, begin + count)`` of a source's endless line."""
    rounds = range(begin // len(rows), -(-(begin + count) // len(rows)))
    line = [rows[permute(len(rows), seed, "source", number, turn)] for turn in rounds]
    start = begin % len(rows)
    return np.concatenate([rows[:0], *line])[start : start + count]


_Numbers = Sequence[int] | npt.NDArray[Any]


def best_fit(lengths: _Numbers, order: _Numbers, budget: int) -> list[list[int]]:
    """Pack rows into bins, from the longest to the shortest, each where it leaves the least room.

    Rows of one length take their turn as they are in ``order``, so that another order makes other bins; one that occurs
    twice is packed twice. How many bins it takes depends on the lengths alone. None is longer than the budget.

    Returns:
        The rows of each bin, the bin with the longest row first.
    """
    chosen = np.asarray(order, dtype=np.int64)
    sizes = np.asarray(lengths)[chosen]
    falling = np.argsort(-sizes, kind="stable")
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(budget + 1)]  # bins by the room left in them
    rooms = 0  # bit r is set where with_room[r] is not empty: the least room that will do is one bit scan away
    for row, size in zip(chosen[falling].tolist(), sizes[falling].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            bins[number].append(row)
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, number = budget, len(bins)
            bins.append([row])
        with_room[room - size].append(number)
        rooms |= 1 << (room - size)
    return bins


def make_count(bins: list[list[int]], lengths: _Numbers, count: int) -> list[list[int]]:
    """Return ``count`` bins, at most as many as rows: the emptiest are left out, or those with most rows cut in two."""
    if len(bins) > count:
        sizes = np.asarray(lengths)
        fill = np.array([sizes[rows].sum() for rows in bins])
        kept = np.sort(np.argsort(-fill, kind="stable")[:count])
        return [bins[number] for number in kept.tolist()]
    bins = list(bins)
    while len(bins) < count:
        number = max(range(len(bins)), key=lambda n: len(bins[n]))
        rows = bins[number]
        bins[number] = rows[::2]
        bins.append(rows[1::2])
    return bins
