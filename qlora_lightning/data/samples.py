"""Token ids and labels of one conversation, cut to the longest length that is trained."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qlora_lightning.data.chat import IGNORED
from qlora_lightning.errors import UserError


class Sample(NamedTuple):
    """One conversation, ready to be laid into a batch.

    Attributes:
        ids: token ids, ``(length,)`` int32.
        labels: aligned with ``ids``, -100 where nothing is trained; the first is always -100. ``(length,)`` int32.
        row_id: number of the row among the rows of its split, from 0; -1 in a filler.
        source: which of the split's sources the row came from.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    row_id: int
    source: int


def make_sample(ids: Sequence[int], labels: Sequence[int], row_id: int, source: int = 0) -> Sample:
    """Make a sample of plain lists; nothing precedes the first token, so its label is dropped."""
    targets = torch.tensor(labels, dtype=torch.int32)  # (length,)
    targets[:1] = IGNORED
    return Sample(torch.tensor(ids, dtype=torch.int32), targets, row_id, source)


def mute(sample: Sample) -> Sample:
    """Return the sample as a filler: same tokens, nothing labelled, no row of its own."""
    return Sample(sample.ids, torch.full_like(sample.labels, IGNORED), -1, sample.source)


def shorten(ids: list[int], labels: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Cut a sample to ``max_length`` tokens, out of the middle of its prompt first, then off the end of its answers.

    The prompt is what stands before the first labelled token. It keeps its start (system prompt, header) and its end
    (the header of the answer). If the answers do not fit beside a quarter of ``max_length`` (or the whole prompt, if
    that is shorter), they lose their end, and with it the stop token: none is trained where the text does not end.
    A sample that fits is returned as it is.

    Args:
        ids: token ids.
        labels: aligned with ``ids``, -100 where nothing is trained.
        max_length: tokens, at least 2.

    Raises:
        UserError: if ``max_length`` is less than 2.
    """
    if max_length < 2:
        raise UserError(f"max_length: expected at least 2 (a token and the one that it predicts), found {max_length}.")
    if len(ids) <= max_length:
        return ids, labels
    labelled = [at for at, label in enumerate(labels) if at > 0 and label != IGNORED]
    if not labelled:
        return ids[:max_length], labels[:max_length]
    first, end = labelled[0], labelled[-1] + 1
    quarter = -(-max_length // 4)
    prompt = min(first, max(quarter, max_length - (end - first)))
    end = min(end, first + max_length - prompt)
    end = next(at for at in reversed(labelled) if at < end) + 1  # of a turn that was cut away, keep no header
    head, tail = prompt // 2, prompt - prompt // 2
    keep = [*range(head), *range(first - tail, end)]
    return [ids[at] for at in keep], [labels[at] for at in keep]
