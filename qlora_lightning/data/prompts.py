"""Rows to predict: prompts for generation, what the rows themselves answer, and batches of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from qlora_lightning.data.batches.order import count_batches, rank_batches
from qlora_lightning.data.chat.labels import IGNORED
from qlora_lightning.data.samples import SampleSet, SampleSetBuilder


class Prompt(NamedTuple):
    """One row to predict: the ids that generation starts from, the row's own answer if it has one, and the row."""

    ids: list[int]
    reference: str | None
    row_id: int
    values: dict[str, Any]
    file: str | None = None
    line: int = 0


def as_samples(prompts: Sequence[Prompt]) -> SampleSet:
    """Return prompts as samples without labels: what can be looked at like the rows of another split."""
    builder = SampleSetBuilder()
    for prompt in prompts:
        builder.add(prompt.ids, [IGNORED] * len(prompt.ids), prompt.row_id, 0, prompt.file, prompt.line)
    return builder.build()


class PromptBatch(TypedDict):
    """Several rows to predict; plain lists. A rank that has no row left gets no prompts."""

    prompt_ids: list[list[int]]
    stop_ids: list[int]
    references: list[str | None]
    row_ids: list[int]
    rows: list[dict[str, Any]]


@dataclass
class PromptLoader:
    """One rank's prompts in file order; every rank has the same number of batches.

    Attributes:
        prompts: all prompts, the same on every rank.
        batch_size: rows per batch on each rank.
        stop_ids: tokens that end an answer.
        rank: of this process.
        world_size: number of processes that share the rows.
    """

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
