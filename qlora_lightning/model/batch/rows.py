"""Names the rows of a flat batch for messages: file and line, tokens, and text."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def row_places(data: Any, row_ids: Iterable[int]) -> list[str]:
    """Say where training rows stand: ``train.jsonl:17``, or ``row 16`` where the data do not know.

    Args:
        data: The Trainer's data module, or ``None``; one of ours knows the places.
        row_ids: Numbers of the rows among the training rows; negative ones are fillers and left out.
    """
    samples: Any = getattr(data, "samples", {}).get("train")
    places = []
    for row_id in row_ids:
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
    """Cut a flat batch into one of each row, as if it came alone; a batch of another make stays whole."""
    if not is_flat(batch):
        return []
    bounds: Tensor = batch["cu_seqlens"]
    ends = bounds.tolist()
    return [
        {
            **{name: batch[name][:, start:end] for name in ("input_ids", "position_ids", "labels")},
            **{name: batch[name][number : number + 1] for name in ("row_ids", "source")},
            "cu_seqlens": bounds.new_tensor([0, end - start]),
            "longest": end - start,
        }
        for number, (start, end) in enumerate(itertools.pairwise(ends))
    ]


def describe_row(data: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a batch of one row in plain values: id, place, tokens and, where there is a tokenizer, text."""
    row_id = int(row["row_ids"][0])
    ids = row["input_ids"][0].tolist()
    tokenizer = getattr(data, "tokenizer", None)
    return {
        "row_id": row_id,
        "place": next(iter(row_places(data, [row_id])), "filler"),
        "tokens": len(ids),
        "labelled_tokens": int((row["labels"] != -100).sum()),
        "text": None if tokenizer is None else tokenizer.decode(ids),
    }
