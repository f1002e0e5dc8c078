"""Token ids and labels of one conversation, or of a piece of it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qlora_lightning.data.chat.renderer import IGNORED


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
