"""Loaders of an epoch's batches, with a position from which a run resumes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from qlora_lightning.data.batches.collate import Batch, collate_rows
from qlora_lightning.data.batches.epoch_plan import EpochPlan, count_batches, rank_batches
from qlora_lightning.data.prepare import Prompt
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.errors import UserError


class EpochNumber(SequentialSampler):
    """The epoch of a loader, which Lightning sets on its ``sampler``; it never replaces a ``SequentialSampler``."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch


class FlatLoader:
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


class FabricLoader(FlatLoader, DataLoader[Batch], IterableDataset[Batch]):  # type: ignore[misc]  # of unlike attributes
    """A ``FlatLoader`` for Lightning Fabric, which accepts torch's class only; the Trainer would ask it for workers."""

    # set here, because torch's constructor would set another sampler
    num_workers, persistent_workers, pin_memory, multiprocessing_context = 0, False, False, None

    @property
    def dataset(self) -> IterableDataset[Batch]:  # type: ignore[override]  # a plain attribute there
        """The loader itself: Fabric adds no sampler to an iterable data set, and each rank already has its own rows."""
        return self


class PromptBatch(TypedDict):
    """Several rows to predict, as plain lists; empty ones on a rank that has no row left."""

    prompt_ids: list[list[int]]
    stop_ids: list[int]
    references: list[str | None]
    row_ids: list[int]
    rows: list[dict[str, Any]]


@dataclass
class PromptLoader:
    """One rank's prompts in file order; every rank has the same number of batches."""

    prompts: Sequence[Prompt]
    batch_size: int
    stop_ids: list[int]
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return count_batches(len(self.prompts), self.batch_size, self.world_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        for rows, filler in rank_batches(range(len(self.prompts)), self.batch_size, self.rank, self.world_size):
            prompts = [] if filler else [self.prompts[row] for row in rows]
            yield {
                "prompt_ids": [prompt.ids for prompt in prompts],
                "stop_ids": self.stop_ids,
                "references": [prompt.reference for prompt in prompts],
                "row_ids": [prompt.row_id for prompt in prompts],
                "rows": [prompt.values for prompt in prompts],
            }
