"""Which rows make up each batch of an epoch, and which batch is the largest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qlora_lightning.data.batches.order import (
    RankBatch,
    best_fit,
    count_batches,
    make_count,
    mix_sources,
    permute,
    rank_batches,
    rank_bins,
)
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.errors import UserError


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """Cuts epochs into batches: a pure function of the settings and the epoch, the same on every rank.

    Without ``shuffle`` every epoch is the same: rows in file order, or, packed, bins of them with the longest row
    first. Every epoch has the same number of batches. Under ``shares`` the number of bins may come out
    differently: it is made that of epoch 0, by leaving out the emptiest bins or cutting the fullest in two.

    Raises:
        UserError: a weight or ``tokens_per_batch`` does not fit the samples.
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
            worst, longer = int(lengths.argmax()), int((lengths > budget).sum())
            raise UserError(
                f"tokens_per_batch: expected room for the longest sample, {lengths[worst]:,} tokens "
                f"({self.samples.where(worst)}), found {budget:,}, for which {longer:,} of {len(lengths):,} samples "
                "are too long: raise it, or lower max_length, which shortens them (or as too_long says)."
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
        bins = make_count(self._pack(epoch), self.samples.lengths, self._bins)
        if self.shuffle:
            bins = [bins[number] for number in permute(len(bins), self.seed, epoch, "bins")]
        return rank_bins(bins, rank, self.world_size)

    def __len__(self) -> int:
        """Batches of each rank in any epoch."""
        if self.batch_size is not None:
            return count_batches(len(self.samples), self.batch_size, self.world_size)
        return count_batches(self._bins, 1, self.world_size)

    @cached_property
    def _bins(self) -> int:
        return len(self._pack(0))

    def _pack(self, epoch: int) -> list[list[int]]:
        assert self.tokens_per_batch is not None
        return best_fit(self.samples.lengths, self.order(epoch), self.tokens_per_batch)


_EPOCHS = 10  # whose batches are looked at,
_ROWS = 500_000  # as long as they have no more rows than that: some five seconds


def epochs_to_look_at(plan: EpochPlan, now: int = 0, max_epochs: int | None = None) -> range:
    """Return the epochs whose batches are worth a look: this one and, of small data that is shuffled, the nine after.

    ``max_epochs`` of None or -1 is a run without end.
    """
    changes = plan.shuffle and plan.tokens_per_batch is None  # packed batches are as full in every epoch
    last = max_epochs if changes and max_epochs is not None else now + 1
    most = min(_EPOCHS, _ROWS // max(1, len(plan.samples)))
    return range(now, max(now + 1, min(last, now + most)))


def first_and_largest(
    plan: EpochPlan,
    epochs: range,
    done: int = 0,
    limit: int | None = None,
    rank: int = 0,
    count: Callable[[Sequence[int]], int] | None = None,
) -> tuple[RankBatch, RankBatch] | None:
    """Return the first batch to come and the largest; None if none is to come.

    The largest has the most tokens that are computed; the longest row decides between equals.

    Args:
        plan: of all epochs.
        epochs: those that are looked at.
        done: batches of the first of them that are done.
        limit: batches of each epoch; None for all.
        rank: whose.
        count: counts the tokens that are computed of a batch of rows; None: all of them are.
    """
    lengths = plan.samples.lengths
    batches = plan.batches(epochs[0], rank)[done:limit]
    for epoch in epochs[1:]:
        batches += plan.batches(epoch, rank)[:limit]
    if not batches:
        return None

    def tokens(batch: RankBatch) -> int:
        return int(lengths[batch.rows].sum())

    largest, most = batches[0], (-1, -1)
    for batch in sorted(batches, key=tokens, reverse=True):
        if tokens(batch) < most[0]:
            break  # no more are computed than there are
        cost = (tokens(batch) if count is None else count(batch.rows), int(lengths[batch.rows].max()))
        if cost > most:
            largest, most = batch, cost
    return batches[0], largest
