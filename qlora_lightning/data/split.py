"""Validation rows held out of the training rows, by content."""

import hashlib
from collections.abc import Sequence

from qlora_lightning.data.samples import Sample
from qlora_lightning.errors import UserError


def hold_out(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split samples into (training, validation), both in file order.

    Rows with the same tokens stand on the same side, so that no duplicate is trained on and validated on: the fraction
    is of different contents, at least one on each side. A row's place depends on its content and the seed, not on its
    line.

    Raises:
        UserError: if the fraction is not between 0 and 1, or there are fewer than two different rows.
    """
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction: expected a number between 0 and 1, found {fraction}.")
    digests = [_digest(sample, seed) for sample in samples]
    contents = sorted(set(digests))
    if len(contents) < 2:
        raise UserError(f"val_fraction: expected at least 2 different rows to split, found {len(contents)}.")
    held = set(contents[: min(max(round(fraction * len(contents)), 1), len(contents) - 1)])
    training = [sample for sample, digest in zip(samples, digests, strict=True) if digest not in held]
    validation = [sample for sample, digest in zip(samples, digests, strict=True) if digest in held]
    return training, validation


def _digest(sample: Sample, seed: int) -> bytes:
    return hashlib.blake2b(sample.ids.numpy().tobytes(), key=str(seed).encode(), digest_size=16).digest()
