"""A flat batch of random tokens."""

import itertools

import torch

from qlora_lightning.model.layout import IGNORED


def make_flat_batch(lengths, seed=1, vocabulary=40_000):
    """Lay samples of random tokens end to end; the first token of each has no label."""
    bounds = [0, *itertools.accumulate(lengths)]
    ids = torch.randint(5, vocabulary, (1, bounds[-1]), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, bounds[:-1]] = IGNORED
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "longest": max(lengths),
    }


def to_device(batch, device):
    return {name: each if isinstance(each, int) else each.to(device) for name, each in batch.items()}
