"""Batches in the order of an epoch, from which a run can stop and resume."""

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
    """The epoch of a loader, which Lightning sets on its ``sampler``; from one of this class it takes no rows."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next iteration takes."""
        self.epoch = epoch


class FlatLoader:
    """One rank's batches of a split, with a position that Lightning saves and restores.

    torch's ``DataLoader`` has no position to save. Here the state counts batches handed out, which under Lightning
    (it fetches nothing ahead from a sized loader) are batches consumed. There are no worker processes: laying ready
    tokens end to end takes less time than sending them.
    """

    batch_sampler = None  # Lightning reads it wherever there is a `sampler`

    def __init__(self, plan: EpochPlan, rank: int = 0) -> None:
        self.plan, self.rank = plan, rank
        self.sampler = EpochNumber()
        self._epoch = 0
        self._position = 0
        self._restored = False
        self._has_ended = False  # the epoch that was restored: with more rows now, it would have batches left

    @property
    def samples(self) -> SampleSet:
        """All samples of the split."""
        return self.plan.samples

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing below runs before the first batch, when Lightning has set the epoch.
        epoch = self.sampler.epoch
        continues = self._restored and self._epoch == epoch and self._position < len(self)
        if continues and self._has_ended:
            return
        start = self._position if continues else 0
        self._epoch, self._position, self._restored = epoch, start, False
        batches = self.plan.batches(epoch, self.rank)
        for position in range(start, len(batches)):
            self._position = position + 1
            yield collate_rows(self.samples, *batches[position])

    def state_dict(self) -> dict[str, Any]:
        """Return epoch, batches consumed in it, and what they were cut from, as plain values."""
        position = self._position if self._epoch == self.sampler.epoch else 0
        return {"epoch": self.sampler.epoch, "position": position, "batches": len(self), **self._cut_from()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue behind the batches that were consumed, if the next iteration is of the same epoch.

        Raises:
            UserError: if the position lies inside an epoch of other data, or of batches that were cut differently.
        """
        epoch, position, batches = (state_dict[key] for key in ("epoch", "position", "batches"))
        for key, mine in self._cut_from().items():
            stored = state_dict.get(key, mine)
            if 0 < position < batches and mine != stored:
                raise UserError(
                    f"the checkpoint was saved after batch {position} of an epoch with {key} = {stored}, but now {key} "
                    f"= {mine}: to resume inside that epoch keep the training data, max_length, too_long, batch_size "
                    "times processes (tokens_per_batch and processes), shuffle and weights as they were."
                )
        self._epoch, self._position, self._restored = epoch, position, True
        self._has_ended = position >= batches
        self.sampler.set_epoch(epoch)

    def _cut_from(self) -> dict[str, Any]:
        """Return what decides the batches of an epoch, beside the seed."""
        plan = self.plan
        return {
            "rows": len(self.samples),
            "tokens": len(self.samples.ids),
            "rows_per_batch": (plan.batch_size or 0) * plan.world_size,
            "tokens_per_batch": plan.tokens_per_batch or 0,
            # two ranks of 2,048 pack other bins than one of 4,096
            "bins_per_batch": plan.world_size if plan.tokens_per_batch else 0,
            "shuffle": plan.shuffle,
            "weights": None if plan.shares is None else [float(share) for share in plan.shares],
        }


class FabricLoader(FlatLoader, DataLoader[Batch], IterableDataset[Batch]):  # type: ignore[misc]  # of unlike attributes
    """A ``FlatLoader`` for Lightning Fabric, which takes torch's class only; the Trainer would ask that for workers."""

    # of torch's class, whose constructor would set another sampler
    num_workers, persistent_workers, pin_memory, multiprocessing_context = 0, False, False, None

    @property
    def dataset(self) -> IterableDataset[Batch]:  # type: ignore[override]  # a plain attribute there
        """Itself: Fabric puts no sampler of its own before an iterable data set. Each rank has its own rows already."""
        return self


class PromptBatch(TypedDict):
    """Several rows to predict; plain lists. A rank that has no row left gets no prompts."""

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
