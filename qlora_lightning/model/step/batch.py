"""A micro-batch: its rows, and the shape that memory and time depend on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_lightning.model.step.layout import IGNORED, find_needed


def row_places(data: Any, row_ids: Iterable[int]) -> list[str]:
    """Return where training rows are from: ``train.jsonl:17``, or ``row 16`` if the data do not know.

    Args:
        data: The Trainer's data module, or ``None``; one of ours knows the places.
        row_ids: Numbers of the rows among the training rows; negative ones are fillers and left out.
    """
    samples: Any = getattr(data, "samples", {}).get("train")
    places = []
    for row_id in dict.fromkeys(row_ids):
        if row_id < 0:
            continue
        found = [] if samples is None else np.flatnonzero(samples.row_ids == row_id)[:1].tolist()
        places.append(samples.where(found[0]) if found else f"row {row_id}")
    return places


def join_places(places: Sequence[str], most: int = 8) -> str:
    """Join places for a message, the first few of them."""
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return (", ".join(places[:most]) or "unknown") + more


def is_flat(batch: Any) -> bool:
    """Whether a batch is one flat stream whose rows are known."""
    needed = {"input_ids", "position_ids", "labels", "cu_seqlens", "row_ids", "source"}
    return isinstance(batch, Mapping) and needed <= batch.keys()


def cut_into_rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cut a flat batch into one of each row, as if it came alone; one of another kind is not cut: no rows.

    A row of preferences is a pair of samples.
    """
    if not is_flat(batch):
        return []
    bounds, size = batch["cu_seqlens"], 2 if batch.get("pairs") else 1
    rows = []
    for first in range(0, len(bounds) - 1, size):
        own = bounds[first : first + size + 1]
        start, end = int(own[0]), int(own[-1])
        names = [name for name in ("row_ids", "source", "weights") if name in batch]
        row = {
            **{name: batch[name][:, start:end] for name in ("input_ids", "position_ids", "labels")},
            **{name: batch[name][first : first + size] for name in names},
            "cu_seqlens": own - start,
            "longest": int(own.diff().max()),
        }
        rows.append({**row, "pairs": True} if size == 2 else row)
    return rows


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

    def figures(self) -> dict[str, int]:
        """Return what ``plan`` and ``plan.json`` say of it."""
        longest = max(self.lengths)
        return {"rows": len(self.lengths), "tokens": self.tokens, "longest": longest, "labelled": self.labelled}

    def whole(self) -> "BatchShape":
        """Return the shape if all tokens are computed."""
        return BatchShape(self.lengths, self.labelled)

    def cut(self, most: int) -> "BatchShape":
        """Estimate the shape with samples of at most so many tokens, labelled ones in proportion."""
        lengths, seen, shared = (
            tuple(min(each, most) for each in counts) for counts in (self.lengths, self.seen, self.shared)
        )
        return BatchShape(lengths, self._labelled_of(lengths), seen, shared)

    def longest(self, samples: int) -> "BatchShape":
        """Estimate the shape of its longest samples: labelled tokens in proportion, and they share as much."""
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
    """Read the shape of the batch of some rows of a :class:`~qlora_lightning.data.samples.SampleSet`."""
    spans = samples.spans(rows)
    return _shape_of([samples.ids[span] for span in spans], [samples.labelled[span] for span in spans])


def computed_counter(samples: Any, leaves_out: bool) -> Callable[[Sequence[int]], int]:
    """Return what counts the computed tokens of the batch of some rows, with or without those that no loss needs."""
    if leaves_out:
        return lambda rows: shape_of_rows(samples, rows).computed
    return lambda rows: int(samples.lengths[rows].sum())


def _shape_of(ids: Sequence[Any], labelled: Sequence[Any]) -> BatchShape:
    needed = find_needed(ids, [each[1:] for each in labelled])  # from each token the next is predicted
    return BatchShape(
        tuple(map(len, ids)), sum(int(each.sum()) for each in labelled), tuple(needed.seen), tuple(needed.shared)
    )
