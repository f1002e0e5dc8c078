"""Packed batches of samples, and their loaders, with a position from which a run resumes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from qlora_lightning.data.batches.epoch_plan import EpochPlan, count_batches, rank_batches
from qlora_lightning.data.prepare import Prompt
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.sources.tensors import IGNORED
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
    if samples.first is not None:
        batch["pairs"] = True
    if samples.desirable is not None:
        batch["desirable"] = torch.from_numpy(samples.desirable[rows])
    return batch


class EpochNumber(SequentialSampler):
    """The epoch of a loader, which Lightning sets on its ``sampler``; it never replaces a ``SequentialSampler``."""

    def __init__(self) -> None:
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
        self.sampler = EpochNumber()
        self._epoch = 0
        self._position = 0
        self._restored = False
        self._has_ended = False  # whether the restored epoch was over, though more rows now would give it more batches

    @property
    def samples(self) -> SampleSet:
        """All samples of the split."""
        return self.plan.samples

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
            yield collate_rows(self.samples, *batches[position])

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
                    "times processes (tokens_per_batch and processes), shuffle and weights as they were."
                )
        self._epoch, self._position, self._restored = epoch, position, True
        self._has_ended = position >= batches
        self.sampler.set_epoch(epoch)

    def _cut_from(self) -> dict[str, Any]:
        """Return what decides the batches of an epoch, besides the seed."""
        plan = self.plan
        return {
            "rows": len(self.samples),
            "tokens": len(self.samples.ids),
            "rows_per_batch": (plan.batch_size or 0) * plan.world_size,
            "tokens_per_batch": plan.tokens_per_batch or 0,
            # two ranks with 2,048 tokens pack other bins than one with 4,096
            "bins_per_batch": plan.world_size if plan.tokens_per_batch else 0,
            "shuffle": plan.shuffle,
            "weights": None if plan.shares is None else [float(share) for share in plan.shares],
        }


class FabricLoader(PackedLoader, DataLoader[Batch], IterableDataset[Batch]):  # type: ignore[misc]  # unlike attributes
    """A ``PackedLoader`` for Fabric, which accepts torch's class only; the Trainer would ask it for workers."""

    # set here, because torch's constructor would set another sampler
    num_workers, persistent_workers, pin_memory, multiprocessing_context = 0, False, False, None

    @property
    def dataset(self) -> IterableDataset[Batch]:  # type: ignore[override]  # a plain attribute there
        """The loader itself: Fabric adds no sampler to an iterable data set, and each rank already has its own rows."""
        return self


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
