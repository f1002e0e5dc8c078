"""Validation rows held out of the training rows, by content."""

from collections.abc import Sequence

import numpy as np

from qlora_lightning.data.samples.duplicates import digest_rows
from qlora_lightning.data.samples.sample import Sample
from qlora_lightning.data.samples.sample_builder import gather_samples
from qlora_lightning.data.samples.sample_set import SampleSet
from qlora_lightning.support.errors import UserError


def hold_out(samples: SampleSet | Sequence[Sample], fraction: float, seed: int) -> tuple[SampleSet, SampleSet]:
    """Split samples into (training, validation), both in file order.

    Rows with the same tokens stand on the same side, so that no duplicate is trained on and validated on, and so do all
    pieces of a row: the fraction is of different contents, at least one on each side. A row's place depends on its
    content and the seed, not on its line.

    Raises:
        UserError: there are fewer than two different rows.
    """
    samples = gather_samples(samples)
    digests = digest_rows(samples, key=str(seed).encode(), labels=False)
    contents = np.unique(digests)  # sorted: those held out are the ones with the lowest hashes
    if len(contents) < 2:
        raise UserError(f"val_fraction: expected at least 2 different rows to split, found {len(contents)}.")
    count = min(max(round(fraction * len(contents)), 1), len(contents) - 1)
    held = digests <= contents[count - 1]
    return samples.take(np.flatnonzero(~held)), samples.take(np.flatnonzero(held))
