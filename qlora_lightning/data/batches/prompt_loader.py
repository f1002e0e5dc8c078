"""Prompts of rows to predict, several at a time, each rank its share of them."""

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

from qlora_lightning.data.batches.order import count_batches, rank_batches
from qlora_lightning.data.samples.prompts import Prompt


class PromptBatch(TypedDict):
    """Several rows to predict; plain lists. A rank that has no row left gets no prompts."""

    prompt_ids: list[list[int]]
    stop_ids: list[int]
    references: list[str | None]
    row_ids: list[int]
    rows: list[dict[str, Any]]


class PromptLoader:
    """One rank's prompts in file order; every rank has the same number of batches.

    Args:
        prompts: all prompts, the same on every rank.
        batch_size: rows per batch on each rank.
        stop_ids: tokens that end an answer.
        rank: of this process.
        world_size: number of processes that share the rows.
    """

    def __init__(
        self, prompts: Sequence[Prompt], batch_size: int, stop_ids: Sequence[int], rank: int = 0, world_size: int = 1
    ) -> None:
        self.prompts = prompts
        self.batch_size = batch_size
        self.stop_ids = list(stop_ids)
        self.rank = rank
        self.world_size = world_size

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
