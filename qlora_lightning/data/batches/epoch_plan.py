"""Which rows make up each batch of an epoch: their order, mixed by weight or packed, and each rank's share of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.errors import UserError


class RankBatch(NamedTuple):
    """The rows of one batch on one rank; a filler's row is only there to be run, its labels count nothing."""

    rows: list[int]
    filler: bool


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """Cuts epochs into batches: a pure function of the settings and the epoch, the same on every rank.

    Without ``shuffle`` every epoch is the same: rows in file order, packed too. Every epoch has the same number of
    batches: under ``shares``, where the number of bins may come out differently, that of epoch 0: the last bins are
    left out, or the first come twice.
    """

    samples: SampleSet
    batch_size: int | None = None  # rows per batch on each rank; or
    tokens_per_batch: int | None = None  # tokens per batch on each rank, which best-fit bins stay within
    shuffle: bool = False
    shares: Sequence[float] | None = None  # of an epoch, by source; without, each row is taken once an epoch
    seed: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert (self.batch_size is None) != (self.tokens_per_batch is None)
        if self.shares is not None:
            rows = np.bincount(self.samples.source, minlength=len(self.shares))
            if not rows.all():
                number = int(rows.argmin()) + 1
                raise UserError(f"weight: source {number} has no usable row, so it has no share: leave it out.")
        lengths, budget = self.samples.lengths, self.tokens_per_batch
        if budget is not None and lengths.max(initial=0) > budget:
            worst = int(lengths.argmax())
            raise UserError(
                f"tokens_per_batch: expected room for the longest sample, {lengths[worst]:,} tokens "
                f"({self.samples.where(worst)}), found {budget:,}: raise it, or lower max_length."
            )

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the rows of an epoch in their order, ``(N,)``."""
        n = len(self.samples)
        epoch = epoch if self.shuffle else 0
        if self.shares is not None:
            return mix_sources(self.samples.source, self.shares, self.seed, epoch)
        return permute(n, self.seed, epoch) if self.shuffle else np.arange(n)

    def batches(self, epoch: int, rank: int = 0) -> list[RankBatch]:
        """Return one rank's batches of an epoch."""
        if self.batch_size is not None:
            return rank_batches(self.order(epoch).tolist(), self.batch_size, rank, self.world_size)
        packed = self._pack(epoch)
        bins = [packed[number % len(packed)] for number in range(self._bins)]
        if self.shuffle:
            bins = [bins[number] for number in permute(len(bins), self.seed, epoch, "bins")]
        return rank_bins(bins, rank, self.world_size)

    def __len__(self) -> int:
        """Batches of each rank in any epoch."""
        if self.batch_size is not None:
            return count_batches(len(self.samples), self.batch_size, self.world_size)
        return count_batches(self._bins, 1, self.world_size)

    def find_largest(self, limit: int | None = None) -> list[int]:
        """Return the rows of the batch with most tokens among the first rank's of epoch 0, or the first ``limit``."""
        lengths = self.samples.lengths
        batches = [batch.rows for batch in self.batches(0)[:limit]]
        return max(batches, key=lambda rows: int(lengths[rows].sum()), default=list[int]())

    @cached_property
    def _bins(self) -> int:
        return len(self._pack(0))

    def _pack(self, epoch: int) -> list[list[int]]:
        assert self.tokens_per_batch is not None
        pack = best_fit if self.shuffle else next_fit  # the first batches of a validation have its first rows
        return pack(self.samples.lengths, self.order(epoch), self.tokens_per_batch)


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
    """Return the bins of one rank, each a batch: bin ``i*w + rank`` is its i-th; without one it runs a filler."""
    batches = rank_batches(range(len(bins)), 1, rank, world_size)
    return [RankBatch(bins[number][:1] if filler else bins[number], filler) for (number,), filler in batches]


def share_out(shares: Sequence[float], n: int) -> list[int]:
    """Divide ``n`` rows among sources in proportion; largest remainders are rounded up, so that they sum to n."""
    exact = np.array(shares) / np.sum(shares) * n
    rows = np.floor(exact).astype(np.int64)
    largest = np.argsort(rows - exact, kind="stable")  # of equal remainders, the first source's
    rows[largest[: n - int(rows.sum())]] += 1
    return [int(count) for count in rows]


def mix_sources(source: npt.NDArray[np.int32], shares: Sequence[float], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the shuffled rows of an epoch in which each source has its share.

    Each source is an endless line of permutations of its rows, from which every epoch takes the next stretch: within a
    source every row is used before any is used again, over epochs too. A row can occur several times in an epoch.
    No epoch needs the ones before it. ``source`` is that of each row, ``(n,)``, as the result; ``shares`` in any unit.
    """
    n = len(source)
    taken = [
        _take(np.flatnonzero(source == number), count * epoch, count, seed, number)
        for number, count in enumerate(share_out(shares, n))
    ]
    return np.concatenate(taken)[permute(n, seed, epoch)]


def _take(rows: npt.NDArray[np.int64], begin: int, count: int, seed: int, number: int) -> npt.NDArray[np.int64]:
    """Return rows ``[begin, begin + count)`` of a source's endless line."""
    rounds = range(begin // len(rows), -(-(begin + count) // len(rows)))
    line = [rows[permute(len(rows), seed, "source", number, turn)] for turn in rounds]
    start = begin % len(rows)
    return np.concatenate([rows[:0], *line])[start : start + count]


_Numbers = Sequence[int] | npt.NDArray[Any]


def next_fit(lengths: _Numbers, order: _Numbers, budget: int) -> list[list[int]]:
    """Pack rows into bins in their order, each bin as full as that allows."""
    bins, room = list[list[int]](), 0
    for row in map(int, order):
        if not bins or lengths[row] > room:
            bins.append([])
            room = budget
        bins[-1].append(row)
        room -= int(lengths[row])
    return bins


def best_fit(lengths: _Numbers, order: _Numbers, budget: int) -> list[list[int]]:
    """Pack rows into bins, from the longest to the shortest, each where it leaves the least room.

    Rows of one length take their turn as they are in ``order``, so that another order makes other bins; how many
    depends on the lengths alone. None is longer than the budget, and the first has the longest row.
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
