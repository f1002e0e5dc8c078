"""Several samples as one flat stream, end to end, without padding."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch

from qlora_lightning.data.chat.labels import IGNORED
from qlora_lightning.data.samples import Sample, SampleSet


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
    return _lay_out(
        np.concatenate([sample.ids.numpy() for sample in samples], dtype=np.int64),
        np.concatenate([sample.labels.numpy() for sample in samples], dtype=np.int64),
        [len(sample.ids) for sample in samples],
        [sample.row_id for sample in samples],
        [sample.source for sample in samples],
    )


def collate_rows(samples: SampleSet, rows: Sequence[int], filler: bool = False) -> Batch:
    """Lay samples of a set end to end; as a filler with nothing labelled and no rows of their own."""
    starts = samples.starts[rows]
    lengths = samples.starts[1:][rows] - starts
    spans = list(map(slice, starts.tolist(), (starts + lengths).tolist()))
    ids = np.concatenate([samples.ids[span] for span in spans], dtype=np.int64)
    if filler:
        labels, row_ids = np.full_like(ids, IGNORED), [-1] * len(rows)
    else:
        labelled = np.concatenate([samples.labelled[span] for span in spans])
        labels, row_ids = np.where(labelled, ids, IGNORED), samples.row_ids[rows].tolist()
    return _lay_out(ids, labels, lengths.tolist(), row_ids, samples.source[rows].tolist())


def _lay_out(
    ids: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    lengths: list[int],
    row_ids: list[int],
    source: list[int],
) -> Batch:
    ends = np.cumsum([0, *lengths])  # (B + 1,)
    labels[ends[:-1]] = IGNORED
    positions = np.arange(len(ids)) - np.repeat(ends[:-1], lengths)
    return {
        "input_ids": torch.from_numpy(ids).unsqueeze(0),
        "position_ids": torch.from_numpy(positions).unsqueeze(0),
        "labels": torch.from_numpy(labels).unsqueeze(0),
        "cu_seqlens": torch.from_numpy(ends.astype(np.int32)),
        "longest": max(lengths),
        "row_ids": torch.tensor(row_ids, dtype=torch.int64),
        "source": torch.tensor(source, dtype=torch.int64),
    }
