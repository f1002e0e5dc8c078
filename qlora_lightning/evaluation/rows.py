"""Rows to judge: each as a batch of its own, with the prompt to answer and the answer that it holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lightning.model.batch import cut_into_rows, is_flat
from qlora_lightning.model.layout import IGNORED

_MOST_NEW, _FEWEST_NEW = 512, 32


@dataclass
class EvaluationRow:
    """One row.

    Attributes:
        batch: It alone, as a flat batch.
        number: Its number in its split.
        source: Which of the split's sources it came from.
        prompt: Token ids before the last answer; ``None`` where no prompt stands before what is labelled.
        expected: Token ids of the last answer, its stop token included.
        place: File and line, where they are known.
        group: What it is counted under, if the user groups rows.
    """

    batch: dict[str, Any]
    number: int
    source: int
    prompt: list[int] | None
    expected: list[int]
    place: str = ""
    group: str | None = None


def cut_rows(batch: Mapping[str, Any]) -> list[EvaluationRow]:
    """Cut a flat batch into rows to judge; fillers, and rows without a labelled token, are left out.

    A batch of another make is judged as a whole, by its loss.
    """
    if not is_flat(batch):
        return [EvaluationRow(dict(batch), -1, 0, None, [])]
    rows = []
    for alone in cut_into_rows(batch):
        ids, labels = alone["input_ids"][0].tolist(), alone["labels"][0].tolist()
        if any(label != IGNORED for label in labels):
            prompt, expected = split_sample(ids, labels)
            rows.append(EvaluationRow(alone, int(alone["row_ids"][0]), int(alone["source"][0]), prompt, expected))
    return rows


def split_sample(ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int] | None, list[int]]:
    """Give what stands before the last run of labelled tokens, and that run.

    With all tokens labelled (``train_on: all``) there is no telling where the prompt ends: it is ``None``.
    """
    end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
    start = next((place + 1 for place in range(end - 1, -1, -1) if labels[place] == IGNORED), 0)
    return (list(ids[:start]) if start > 1 else None), list(ids[start:end])


def last_turn(prompt: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """Give the part of a prompt between its last two stop tokens: what was asked, without system prompt and header."""
    stops = [place for place, token in enumerate(prompt) if token in stop_ids]
    return list(prompt[(stops[-2] + 1 if len(stops) > 1 else 0) : (stops[-1] if stops else len(prompt))])


def choose_max_new_tokens(rows: Sequence[EvaluationRow]) -> int:
    """Give twice the tokens of the longest expected answer, from 32 to 512: what rambles on shall not cost more."""
    longest = max((len(row.expected) for row in rows), default=0)
    return min(max(2 * longest, _FEWEST_NEW), _MOST_NEW)
