"""Concatenate several samples into one flat stream, without padding."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch

from qlora_lightning.base.tensors import IGNORED
from qlora_lightning.data.samples import SampleSet


class Batch(TypedDict):
    """One flat stream of B samples with T tokens in all; a preference row is two samples, the chosen one first."""

    input_ids: torch.Tensor  # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64, from 0 in each sample
    # (1, T) int64, aligned with input_ids (the loss shifts): -100 where a token is not trained, and at each sample's
    # start, so that nothing is predicted across samples
    labels: torch.Tensor
    cu_seqlens: torch.Tensor  # (B + 1,) int32, start of each sample; the last is T
    row_ids: torch.Tensor  # (B,) int64, number of each sample's row in the split; -1 in a filler
    source: torch.Tensor  # (B,) int64, index of each row's source in the split
    pairs: NotRequired[bool]  # whether each row is two samples, the answers to compare
    desirable: NotRequired[torch.Tensor]  # (B,) bool, the verdict on each answer


def collate_rows(samples: SampleSet, rows: Sequence[int], filler: bool = False) -> Batch:
    """Concatenate samples of a set; a filler has no labels and no row ids."""
    spans = samples.spans(rows)
    lengths = np.array([span.stop - span.start for span in spans])
    rows = np.repeat(rows, len(spans) // len(rows)).tolist()
    starts = np.cumsum([0, *lengths])  # (B + 1,)
    ids = np.concatenate([samples.ids[span] for span in spans], dtype=np.int64)
    if filler:
        labels, row_ids = np.full_like(ids, IGNORED), np.full(len(rows), -1)
    else:
        labelled = np.concatenate([samples.labelled[span] for span in spans])
        labels, row_ids = np.where(labelled, ids, IGNORED), samples.row_ids[rows]
    batch: Batch = {
        "input_ids": torch.from_numpy(ids).unsqueeze(0),
        "position_ids": torch.from_numpy(np.arange(len(ids)) - np.repeat(starts[:-1], lengths)).unsqueeze(0),
        "labels": torch.from_numpy(labels).unsqueeze(0),
        "cu_seqlens": torch.from_numpy(starts.astype(np.int32)),
        "row_ids": torch.from_numpy(row_ids),
        "source": torch.from_numpy(samples.source[rows].astype(np.int64)),
    }
    if samples.first is not None:
        batch["pairs"] = True
    if samples.desirable is not None:
        batch["desirable"] = torch.from_numpy(samples.desirable[rows])
    return batch
