"""Several samples as one flat stream, end to end, without padding."""

from collections.abc import Sequence
from itertools import accumulate
from typing import TypedDict

import torch

from qlora_lightning.data.chat import IGNORED
from qlora_lightning.data.samples import Sample


class Batch(TypedDict):
    """One flat stream of B samples with T tokens in all.

    Attributes:
        input_ids: ``(1, T)`` int64.
        position_ids: ``(1, T)`` int64, from 0 in each sample.
        labels: ``(1, T)`` int64, aligned with ``input_ids`` (the loss shifts); -100 where nothing is trained, and
            at each sample's start, so that nothing is predicted across samples.
        cu_seqlens: ``(B + 1,)`` int32, where each sample begins; the last is T.
        longest: tokens of the longest sample.
        row_ids: ``(B,)`` int64, number of each row in its split; -1 for a filler.
        source: ``(B,)`` int64, which of the split's sources each row came from.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    longest: int
    row_ids: torch.Tensor
    source: torch.Tensor


def collate(samples: Sequence[Sample]) -> Batch:
    """Lay samples end to end; at least one, none of them empty."""
    lengths = [len(sample.ids) for sample in samples]
    starts = [0, *accumulate(lengths)]
    labels = torch.cat([sample.labels for sample in samples]).to(torch.int64)  # (T,)
    labels[starts[:-1]] = IGNORED
    return {
        "input_ids": torch.cat([sample.ids for sample in samples]).to(torch.int64).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "labels": labels.unsqueeze(0),
        "cu_seqlens": torch.tensor(starts, dtype=torch.int32),
        "longest": max(lengths),
        "row_ids": torch.tensor([sample.row_id for sample in samples], dtype=torch.int64),
        "source": torch.tensor([sample.source for sample in samples], dtype=torch.int64),
    }
