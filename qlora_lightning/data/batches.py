"""Batches of an epoch: their rows in order, mixed by weight or packed, each rank's share, and loaders that resume."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from qlora_lightning.data.prepare import Prompt
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.sources.tensors import IGNORED
from qlora_lightning.support.console import count_of
from qlora_lightning.support.errors import UserError


class Batch(TypedDict):
    """One packed stream of B samples with T tokens in all; a preference row is two samples, the chosen one first."""

    input_ids: torch.Tensor  # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64, from 0 in each sample
    # (1, T) int64, aligned with input_ids (the loss shifts): -100 where a token is not trained, and at each sample's
    # start, so that nothing is predicted across samples
    labels: torch.Tensor
    cu_seqlens: torch.Tensor  # (B + 1,) int32, start of each sample; the last is T
    row_ids: torch.Tensor  # (B,) int64, number of each sample's row in the split; -1 in a filler
    source: torch.Tensor  # (B,) int64, index of each row's source in the split
    pairs: NotRequired[bool]  # whether each row is two samples, the answers to compare
    desirable: NotRequired[torch.Tensor]  # (B,) bool, the verdict on each answer


def collate_rows(samples: SampleSet, rows: Sequence[int], filler: bool = False) -> Batch:
    """Concatenate samples of a set; a filler has no labels and no row ids."""
    spans = samples.spans(rows)
    lengths = np.array([span.stop - span.start for span in spans])
    rows = np.repeat(rows, len(spans) // len(rows)).tolist()
    starts = np.cumsum([0, *lengths])  # (B + 1,)
    ids = np.concatenate([samples.ids[span] for span in spans], dtype=np.int64)
    if filler:
        labels, row_ids = np.full_like(ids, IGNORED), np.full(len(rows), -1)
    else:
        labelled = np.concatenate([samples.labelled[span] for span in spans])
        labels, row_ids = np.where(labelled, ids, IGNORED), samples.row_ids[rows]
    batch: Batch = {
        "input_ids": torch.from_numpy(ids).unsqueeze(0),
        "position_ids": torch.from_numpy(np.arange(len(ids)) - np.repeat(starts[:-1], lengths)).unsqueeze(0),
        "labels": torch.from_numpy(labels).unsqueeze(0),
        "cu_seqlens": torch.from_numpy(starts.astype(np.int32)),
        "row_ids": torch.from_numpy(row_ids),
        "source": torch.from_numpy(samples.source[rows].astype(np.int64)),
    }
    if samples.chosen_length is not None:
        batch["pairs"] = True
    if samples.desirable is not None:
        batch["desirable"] = torch.from_numpy(samples.desirable[rows])
    return batch


# ---- plans of epochs -------------------------------------------------------------------------------------------------


class RankBatch(NamedTuple):
    """Rows of one batch on one rank; a filler runs a row without labels to keep the ranks in step."""

    rows: list[int]
    filler: bool


@dataclass(frozen=True, eq=False)
class EpochPlan(Dataset[Batch]):
    """Cuts epochs into batches: a pure function of the settings and the epoch, the same on every rank.

    Without ``shuffle`` every epoch is the same: rows in file order, or packed in one way. Every epoch has as many
    batches as epoch 0. Under ``shares`` another epoch may pack into more or fewer bins: then its last bins are left
    out, or its first bins are repeated.
    """

    samples: SampleSet
    batch_size: int | None = None  # rows per batch on each rank; or
    tokens_per_batch: int | None = None  # the most tokens per batch on each rank
    shuffle: bool = False
    shares: Sequence[float] | None = None  # of an epoch, by source; if None, each row occurs once an epoch
    seed: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert (self.batch_size is None) != (self.tokens_per_batch is None)
        if self.shares is not None:
            n_rows = np.bincount(self.samples.source, minlength=len(self.shares))
            if not n_rows.all():
                source = int(n_rows.argmin()) + 1
                raise UserError(
                    f"weight: source {source} has no usable row, so it has no share: leave it out.", "data.train"
                )
        lengths, budget = self.samples.lengths, self.tokens_per_batch
        if budget is not None and lengths.max(initial=0) > budget:
            longest = int(lengths.argmax())
            raise UserError(
                f"tokens_per_batch: expected room for the longest sample, {count_of(lengths[longest], 'token')} "
                f"({self.samples.where(longest)}), found {budget:,}: raise it, or lower max_length.",
                "data.tokens_per_batch",
            )

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the rows of an epoch in order, ``(N,)``."""
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
        bins = [packed[i % len(packed)] for i in range(self._bins)]
        if self.shuffle:
            bins = [bins[i] for i in permute(len(bins), self.seed, epoch, "bins")]
        # the i-th batch of a rank is bin ``i*w + rank``
        bin_batches = rank_batches(range(len(bins)), 1, rank, self.world_size)
        return [RankBatch(bins[i][:1] if filler else bins[i], filler) for (i,), filler in bin_batches]

    def __getitem__(self, batch: RankBatch) -> Batch:
        return collate_rows(self.samples, *batch)

    def __len__(self) -> int:
        """Number of batches of each rank in any epoch."""
        if self.batch_size is not None:
            return count_batches(len(self.samples), self.batch_size, self.world_size)
        return count_batches(self._bins, 1, self.world_size)

    def find_largest(self, limit: int | None = None) -> list[int]:
        """Return the rows of rank 0's batch with most tokens in epoch 0, or in its first ``limit`` batches."""
        lengths = self.samples.lengths
        batches = [batch.rows for batch in self.batches(0)[:limit]]
        return max(batches, key=lambda rows: int(lengths[rows].sum()), default=list[int]())

    @cached_property
    def _bins(self) -> int:
        return len(self._pack(0))

    def _pack(self, epoch: int) -> list[list[int]]:
        assert self.tokens_per_batch is not None
        return best_fit(self.samples.lengths, self.order(epoch), self.tokens_per_batch)


def permute(n: int, *key: int | str) -> npt.NDArray[np.int64]:
    """Return a permutation of ``range(n)``, ``(n,)``, without a global generator.

    It is a pure function of its arguments; the key is the seed, the epoch and what is permuted.
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

    Batch i of all ranks together is rows ``[i*b*w, (i+1)*b*w)``, so an optimizer step sees the same rows whatever the
    number of ranks. The ranks divide a short last batch evenly, with one row more on the first ranks. A rank without
    rows runs a filler, so that every rank has the same number of batches.
    """
    stride = batch_size * world_size
    batches = []
    for begin in range(0, len(order), stride):
        rows = order[begin : begin + stride]
        rank_rows = np.array_split(rows, world_size)[rank].tolist()
        batches.append(RankBatch(rank_rows or [rows[0]], not rank_rows))
    return batches


def share_out(shares: Sequence[float], n: int) -> list[int]:
    """Divide ``n`` rows among sources in proportion; the largest remainders are rounded up, so that the sum is n."""
    quotas = np.array(shares) / np.sum(shares) * n
    counts = np.floor(quotas).astype(np.int64)
    by_remainder = np.argsort(counts - quotas, kind="stable")  # largest first; of equal ones, the first source
    counts[by_remainder[: n - int(counts.sum())]] += 1
    return [int(count) for count in counts]


def mix_sources(source: npt.NDArray[np.int32], shares: Sequence[float], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the shuffled rows of an epoch in which each source has its share, ``(n,)``.

    Each source is an endless sequence of permutations of its rows, from which every epoch takes the next slice: within
    a source every row is used before any is used again, over epochs too. A row can occur several times in an epoch.
    An epoch does not depend on earlier ones. ``source`` has the source of each row, ``(n,)``; ``shares`` any unit.
    """
    n = len(source)
    rows_by_source = [
        _take(np.flatnonzero(source == i), count * epoch, count, seed, i)
        for i, count in enumerate(share_out(shares, n))
    ]
    return np.concatenate(rows_by_source)[permute(n, seed, epoch)]


def _take(rows: npt.NDArray[np.int64], begin: int, count: int, seed: int, source: int) -> npt.NDArray[np.int64]:
    """Return rows ``[begin, begin + count)`` of a source's endless sequence."""
    passes = range(begin // len(rows), -(-(begin + count) // len(rows)))
    permutations = [rows[permute(len(rows), seed, "source", source, i)] for i in passes]
    start = begin % len(rows)
    return np.concatenate([rows[:0], *permutations])[start : start + count]


_Numbers = Sequence[int] | npt.NDArray[Any]


def best_fit(lengths: _Numbers, order: _Numbers, budget: int) -> list[list[int]]:
    """Pack rows into bins, from the longest to the shortest, each into the fullest bin that it fits.

    Rows of equal length keep their order in ``order``, so another order makes other bins; their number depends on the
    lengths alone. No bin is longer than the budget, and the first has the longest row.
    """
    rows = np.asarray(order, dtype=np.int64)
    sizes = np.asarray(lengths)[rows]
    longest_first = np.argsort(-sizes, kind="stable")
    bins: list[list[int]] = []
    by_capacity: list[list[int]] = [[] for _ in range(budget + 1)]  # indices of bins by their remaining capacity
    capacities = 0  # bit c is set if by_capacity[c] is not empty: one bit scan finds the least sufficient capacity
    for row, size in zip(rows[longest_first].tolist(), sizes[longest_first].tolist(), strict=True):
        sufficient = capacities >> size
        if sufficient:
            capacity = size + (sufficient & -sufficient).bit_length() - 1
            index = by_capacity[capacity].pop()
            bins[index].append(row)
            if not by_capacity[capacity]:
                capacities ^= 1 << capacity
        else:
            capacity, index = budget, len(bins)
            bins.append([row])
        by_capacity[capacity - size].append(index)
        capacities |= 1 << (capacity - size)
    return bins


# ---- loaders ---------------------------------------------------------------------------------------------------------


class RankSampler(DistributedSampler[RankBatch]):
    """One rank's batches of each epoch. Fabric sets the epoch; it would replace a sampler that is not distributed."""

    def __init__(self, plan: EpochPlan, rank: int) -> None:
        super().__init__(plan, plan.world_size, rank)
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[RankBatch]:
        return iter(self.plan.batches(self.epoch, self.rank))


def make_torch_loader(plan: EpochPlan, rank: int) -> DataLoader[Batch]:
    """Return one rank's batches as torch's loader, the only one that Fabric accepts."""
    generator = torch.Generator()  # otherwise it draws a number of the global one
    return DataLoader(plan, batch_size=None, sampler=RankSampler(plan, rank), generator=generator)


class EpochNumber(SequentialSampler):
    """The epoch of a loader, which the Trainer sets on its sampler; with ``overfit_batches`` it expects this class."""

    def __init__(self, plan: EpochPlan) -> None:
        super().__init__(range(len(plan)))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch


class PackedLoader:
    """One rank's batches of a split, with a position that Lightning saves and restores.

    torch's ``DataLoader`` has no position to save. Here the state counts batches yielded, which under Lightning (it
    prefetches nothing from a sized loader) are batches consumed. There are no worker processes: concatenating tokens
    takes less time than sending them.
    """

    batch_sampler = None  # Lightning reads it if there is a `sampler`

    def __init__(self, plan: EpochPlan, rank: int = 0) -> None:
        self.plan, self.rank = plan, rank
        self.sampler = EpochNumber(plan)
        self._epoch = 0
        self._position = 0
        self._restored = False
        self._has_ended = False  # whether the restored epoch was over, though more rows now would give it more batches

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: this runs at the first batch, after Lightning has set the epoch.
        epoch = self.sampler.epoch
        is_resuming = self._restored and self._epoch == epoch and self._position < len(self)
        if is_resuming and self._has_ended:
            return
        start = self._position if is_resuming else 0
        self._epoch, self._position, self._restored = epoch, start, False
        batches = self.plan.batches(epoch, self.rank)
        for position in range(start, len(batches)):
            self._position = position + 1
            yield self.plan[batches[position]]

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of batches consumed and what decides the batches, as plain values."""
        position = self._position if self._epoch == self.sampler.epoch else 0
        return {"epoch": self.sampler.epoch, "position": position, "batches": len(self), **self._cut_from()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume after the batches that were consumed, if the next iteration is of the same epoch.

        Raises:
            UserError: if the position is inside an epoch of other data or of other batches.
        """
        epoch, position, batches = (state_dict[key] for key in ("epoch", "position", "batches"))
        for key, value in self._cut_from().items():
            stored = state_dict.get(key, value)
            if 0 < position < batches and value != stored:
                raise UserError(
                    f"the checkpoint was saved after batch {position} of an epoch with {key} = {stored}, but now {key} "
                    f"= {value}: to resume inside that epoch keep the training data, max_length, too_long, batch_size "
                    "times processes (tokens_per_batch and processes), shuffle and weights as they were.",
                    "checkpoint.batches",
                )
        self._epoch, self._position, self._restored = epoch, position, True
        self._has_ended = position >= batches
        self.sampler.set_epoch(epoch)

    def _cut_from(self) -> dict[str, Any]:
        """Return what decides the batches of an epoch, besides the seed."""
        plan = self.plan
        return {
            "rows": len(plan.samples),
            "tokens": len(plan.samples.ids),
            "rows_per_batch": (plan.batch_size or 0) * plan.world_size,
            "tokens_per_batch": plan.tokens_per_batch or 0,
            # two ranks with 2,048 tokens pack other bins than one with 4,096
            "bins_per_batch": plan.world_size if plan.tokens_per_batch else 0,
            "shuffle": plan.shuffle,
            "weights": None if plan.shares is None else [float(share) for share in plan.shares],
        }


@dataclass
class PromptLoader:
    """One rank's prompts in file order; every rank has the same number of batches."""

    prompts: Sequence[Prompt]
    batch_size: int
    stop_ids: list[int]
    max_new_tokens: int
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return count_batches(len(self.prompts), self.batch_size, self.world_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield ``prompts`` (none on a rank that has no row left), ``stop_ids`` and ``max_new_tokens`` by batch."""
        options = {"stop_ids": self.stop_ids, "max_new_tokens": self.max_new_tokens}
        for rows, filler in rank_batches(range(len(self.prompts)), self.batch_size, self.rank, self.world_size):
            yield {"prompts": [] if filler else [self.prompts[row] for row in rows], **options}
