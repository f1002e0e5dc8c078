"""Samples and packed batches of plain lists."""

from itertools import pairwise
from typing import Any

import numpy as np

from qlora_lightning.data.batches import Batch, collate_rows
from qlora_lightning.data.chat.renderer import TokenizedSample
from qlora_lightning.data.samples import SampleSet, SampleSetBuilder


def gather(*rows: tuple[Any, ...]) -> SampleSet:
    """Make a set of samples: of each its ids, labels and the row's number, and perhaps its source."""
    builder = SampleSetBuilder()
    for row in rows:
        builder.add(*row)
    return builder.build()


def collate(*rows: tuple[Any, ...]) -> Batch:
    """Lay samples, as ``gather`` takes them, end to end."""
    return collate_rows(gather(*rows), range(len(rows)))


def unpack(samples: SampleSet) -> list[TokenizedSample]:
    labels = np.where(samples.labelled, samples.ids, -100)
    spans = [slice(*span) for span in pairwise(samples.starts.tolist())]
    return [TokenizedSample(samples.ids[span].tolist(), labels[span].tolist()) for span in spans]
