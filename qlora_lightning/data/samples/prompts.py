"""Rows to predict: prompts for generation, and what the row itself answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from qlora_lightning.data.chat.renderer import IGNORED
from qlora_lightning.data.samples.sample_builder import SampleSetBuilder
from qlora_lightning.data.samples.sample_set import SampleSet


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
