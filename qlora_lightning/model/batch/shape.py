"""The shape of a micro-batch: how many tokens it has, and how many of them are computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_lightning.model.batch.needed_tokens import find_needed
from qlora_lightning.model.loss import IGNORED


@dataclass(frozen=True)
class BatchShape:
    """The shape of a micro-batch.

    Attributes:
        lengths: Tokens of each sample.
        labelled: Labelled tokens of all samples.
        seen: Of those of each sample, how many something is predicted from; empty: all.
        shared: How many of these are computed with another sample; empty: none.
    """

    lengths: tuple[int, ...]
    labelled: int
    seen: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return sum(self.lengths)

    @property
    def attended(self) -> tuple[int, ...]:
        """Tokens of each sample that attention has."""
        return self.seen or self.lengths

    @property
    def computed(self) -> int:
        """Tokens that are computed."""
        return sum(self.attended) - sum(self.shared)

    def whole(self) -> "BatchShape":
        """Give the batch as it is where all its tokens are computed."""
        return BatchShape(self.lengths, self.labelled)

    def cut(self, most: int) -> "BatchShape":
        """Give about the batch with samples of at most so many tokens, labelled ones in proportion."""
        lengths, seen, shared = (
            tuple(min(each, most) for each in counts) for counts in (self.lengths, self.seen, self.shared)
        )
        return BatchShape(lengths, self._labelled_of(lengths), seen, shared)

    def longest(self, samples: int) -> "BatchShape":
        """Give about the batch of its longest samples: labelled tokens in proportion, and they share as much."""
        order = sorted(range(len(self.lengths)), key=lambda sample: -self.lengths[sample])[:samples]
        lengths, seen, shared = (
            tuple(counts[sample] for sample in order if counts) for counts in (self.lengths, self.seen, self.shared)
        )
        return BatchShape(lengths, self._labelled_of(lengths), seen, (0, *shared[1:]) if shared else ())

    def _labelled_of(self, lengths: Sequence[int]) -> int:
        return -(-self.labelled * sum(lengths) // self.tokens)


def shape_of_batch(batch: Any) -> BatchShape:
    """Read the shape of a flat batch."""
    bounds = batch["cu_seqlens"].tolist()
    ids, labels = (batch[name][0].cpu().numpy() for name in ("input_ids", "labels"))
    return _shape_of(np.split(ids, bounds[1:-1]), np.split(labels != IGNORED, bounds[1:-1]))


def shape_of_rows(samples: Any, rows: Sequence[int]) -> BatchShape:
    """Read the shape of the batch of some rows of a :class:`~qlora_lightning.data.samples.sample_set.SampleSet`."""
    spans = [slice(samples.starts[row], samples.starts[row + 1]) for row in rows]
    return _shape_of([samples.ids[span] for span in spans], [samples.labelled[span] for span in spans])


def computed_counter(samples: Any, leaves_out: bool) -> Callable[[Sequence[int]], int]:
    """Give what counts the tokens that are computed of the batch of some rows.

    Args:
        samples: The rows' set.
        leaves_out: Whether tokens that the loss does not need are left out.
    """
    if leaves_out:
        return lambda rows: shape_of_rows(samples, rows).computed
    return lambda rows: int(samples.lengths[rows].sum())


def _shape_of(ids: Sequence[Any], labelled: Sequence[Any]) -> BatchShape:
    needed = find_needed(ids, [each[1:] for each in labelled])  # from each token the next is predicted
    return BatchShape(
        tuple(map(len, ids)), sum(int(each.sum()) for each in labelled), tuple(needed.seen), tuple(needed.shared)
    )
