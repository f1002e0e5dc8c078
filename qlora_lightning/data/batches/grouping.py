"""An order in which the rows of a micro-batch are of like length."""

import numpy as np
import numpy.typing as npt

from qlora_lightning.data.batches.order import permute

_BATCHES_SORTED_TOGETHER = 50  # more: lengths more alike; fewer: an order more random


def group_by_length(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], stride: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Reorder an epoch so that each ``stride`` rows, from the first on, are of like length.

    A shuffled order is sorted by length in stretches of about 50 batches, then the batches are shuffled. The batch with
    the longest row comes first, so that memory runs out in the first step or never; a short batch stays last.

    Args:
        order: the rows of the epoch, shuffled, ``(n,)``.
        lengths: tokens of every row.
        stride: rows in a micro-batch of all ranks together.
        seed: of the order of the batches.
        epoch: of the order of the batches.

    Returns:
        The same rows, ``(n,)``.
    """
    full = len(order) // stride
    stretch = _BATCHES_SORTED_TOGETHER * stride
    # The last stretch takes what is left over, so that its short batch never stands alone and never holds the longest.
    borders = np.arange(1, full // _BATCHES_SORTED_TOGETHER) * stretch
    parts = np.split(order, borders)
    falling = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    batches, rest = falling[: full * stride].reshape(full, stride), falling[full * stride :]
    if not full:
        return rest
    batches = batches[permute(full, seed, epoch, "groups")]
    first = int(np.argmax(lengths[batches].max(axis=1)))
    batches[[0, first]] = batches[[first, 0]]
    return np.concatenate([batches.ravel(), rest])
