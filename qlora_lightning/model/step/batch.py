"""A micro-batch: its rows, where they are from, and how many of their tokens are computed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qlora_lightning.model.step.layout import find_computed
from qlora_lightning.support.errors import UserError


def samples_of(data: Any, split: str | None) -> Any:
    """Return the samples of a split, if a data module is one of ours; ``samples`` of another may be anything."""
    splits = getattr(data, "samples", None)
    return splits.get(split) if isinstance(splits, dict) else None


def row_locations(data: Any, row_ids: Iterable[int]) -> list[str]:
    """Return where training rows are from: ``train.jsonl:17``, or ``row 16`` if the data do not know.

    Args:
        data: The Trainer's data module, or ``None``; one of ours knows the locations.
        row_ids: Numbers of the rows among the training rows; negative ones are fillers and left out.
    """
    samples = samples_of(data, "train")
    locations = []
    for row_id in dict.fromkeys(row_ids):
        if row_id < 0:
            continue
        found = [] if samples is None else np.flatnonzero(samples.row_ids == row_id)[:1].tolist()
        locations.append(samples.where(found[0]) if found else f"row {row_id}")
    return locations


def format_locations(locations: Sequence[str], most: int = 8) -> str:
    """Join locations for a message, the first few of them."""
    more = f" and {len(locations) - most} more" if len(locations) > most else ""
    return (", ".join(locations[:most]) or "unknown") + more


def is_flat(batch: Any) -> bool:
    """Whether a batch is one flat stream whose rows are known."""
    required = {"input_ids", "position_ids", "labels", "cu_seqlens", "row_ids", "source"}
    return isinstance(batch, Mapping) and required <= batch.keys()


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


def computed_counter(samples: Any, skips_unlabelled: bool) -> Callable[[Sequence[int]], int]:
    """Return what counts the computed tokens of a batch of rows of a :class:`~qlora_lightning.data.samples.SampleSet`.

    Args:
        samples: The rows.
        skips_unlabelled: Whether tokens that no loss needs are not computed, and shared beginnings once.
    """

    def count(rows: Sequence[int]) -> int:
        if not skips_unlabelled:
            return int(samples.lengths[rows].sum())
        spans = samples.spans(rows)
        predicts = [samples.labelled[span][1:] for span in spans]  # from each token the next is predicted
        return find_computed([samples.ids[span] for span in spans], predicts).count

    return count


def check_row_length(config: Any, longest: int) -> None:
    """Refuse rows whose angles would depend on the longest row of their batch: they would be trained otherwise in each.

    The rotary types ``dynamic`` (NTK) and ``longrope`` scale all angles by a row that is beyond the length of the
    base's pre-training.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *rope.values()):  # some have parameters for each type of layer
        kind = each.get("rope_type") if isinstance(each, Mapping) else None
        limit = config.max_position_embeddings if kind in ("dynamic", "longrope") else longest
        if kind == "longrope":
            limit = each.get("original_max_position_embeddings", limit)
        if longest > limit:
            raise UserError(
                f"This base scales its rotary embedding ({kind}) by the longest row of a batch if that has more than "
                f"{limit:,} tokens, and rows here may have {longest:,}: the same row would be trained differently in "
                f"each batch. Set data.max_length to {limit} or less."
            )
