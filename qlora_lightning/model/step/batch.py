"""A flat batch: its rows, where they are from, and how it is cut into parts of whole rows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qlora_lightning.base.tensors import IGNORED
from qlora_lightning.support.errors import UserError

# The tensors of a flat batch.
_PER_TOKEN = ("input_ids", "position_ids", "labels")
_PER_ROW = ("row_ids", "source", "desirable")
_NAMED = 8  # rows in a message
_LONGEST_CAPPED = 4096  # tokens: 1 GiB of scores in a layer of Gemma 2 9B, in float32


def samples_of(data: Any, split: str | None) -> Any:
    """Return the samples of a split, if a data module is one of ours; ``samples`` of another may be anything."""
    splits = getattr(data, "samples", None)
    return splits.get(split) if isinstance(splits, dict) else None


def row_locations(data: Any, row_ids: Iterable[int], split: str | None = "train") -> list[str]:
    """Return where rows are from: ``train.jsonl:17``, or ``row 16`` if the data do not know.

    Args:
        data: The Trainer's data module, or ``None``; one of ours knows the locations.
        row_ids: Numbers of the rows in their split; negative ones are fillers and left out.
        split: ``train``, ``val`` or ``test``.
    """
    samples = samples_of(data, split)
    locations = []
    for row_id in dict.fromkeys(row_ids):
        if row_id < 0:
            continue
        found = [] if samples is None else np.flatnonzero(samples.row_ids == row_id)[:1].tolist()
        locations.append(samples.where(found[0]) if found else f"row {row_id}")
    return locations


def format_locations(locations: Sequence[str]) -> str:
    """Join locations for a message, the first few of them."""
    more = f" and {len(locations) - _NAMED} more" if len(locations) > _NAMED else ""
    return (", ".join(locations[:_NAMED]) or "unknown") + more


def is_flat(batch: Any) -> bool:
    """Whether a batch is one flat stream that can be cut into rows: not with a collate function's own tensors."""
    if not isinstance(batch, Mapping):
        return False
    tensors = {name for name, each in batch.items() if isinstance(each, torch.Tensor)}
    return tensors - {"desirable"} == {*_PER_TOKEN, "cu_seqlens", "row_ids", "source"}


def samples_per_row(batch: Mapping[str, Any]) -> int:
    """Return how many samples a row is: of preferences a pair."""
    return 2 if batch.get("pairs") else 1


def cut_into_rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cut a flat batch into one of each row, as if it came alone; one of another kind is not cut: no rows."""
    return cut_batch(batch, batch["cu_seqlens"].tolist(), max_tokens=0) if is_flat(batch) else []


def cut_batch(batch: Mapping[str, Any], cu_seqlens: Sequence[int], max_tokens: int) -> list[dict[str, Any]]:
    """Cut a flat batch into parts of whole rows, in their order, each a flat batch.

    Args:
        batch: The batch.
        cu_seqlens: Where its samples begin, and the last one ends: on the host.
        max_tokens: Of a part; a row alone may have more.
    """
    size, parts, first = samples_per_row(batch), [], 0
    for row in range(size, len(cu_seqlens) - 1, size):
        if cu_seqlens[row + size] - cu_seqlens[first] > max_tokens:
            parts.append(_slice_samples(batch, first, row, cu_seqlens))
            first = row
    return [*parts, _slice_samples(batch, first, len(cu_seqlens) - 1, cu_seqlens)]


def _slice_samples(batch: Mapping[str, Any], first: int, last: int, cu_seqlens: Sequence[int]) -> dict[str, Any]:
    """Return the flat batch of samples ``first`` to ``last``, the latter excluded; tensors are views of the batch's."""
    start, end = cu_seqlens[first], cu_seqlens[last]
    part = {name: each for name, each in batch.items() if name != "layouts"}
    part |= {name: batch[name][:, start:end] for name in _PER_TOKEN}
    part |= {name: batch[name][first:last] for name in _PER_ROW if name in batch}
    part["cu_seqlens"] = batch["cu_seqlens"][first : last + 1] - start
    return part


def filler_of(batch: Mapping[str, Any], cu_seqlens: Sequence[int]) -> dict[str, Any]:
    """Return the first row without labels: an empty pass for a process that has fewer micro-batches than others."""
    first = _slice_samples(batch, 0, samples_per_row(batch), cu_seqlens)
    labels, row_ids = torch.full_like(first["labels"], IGNORED), torch.full_like(first["row_ids"], -1)
    return {**first, "labels": labels, "row_ids": row_ids}


def most_positions(config: Any) -> int | None:
    """Return for how many tokens a base has positions, or was pre-trained; MPT has its own name for it."""
    names = ("max_position_embeddings", "max_seq_len")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), None)


def check_row_length(config: Any, longest: int) -> None:
    """Refuse rows that are too long: for a table of positions, or since their angles would depend on the longest one.

    The rotary types ``dynamic`` (NTK) and ``longrope`` scale all angles by a row that is beyond the length of the
    base's pre-training.
    """
    rope, most = getattr(config, "rope_parameters", None) or {}, most_positions(config)
    if not rope and most is not None and longest > most:  # a table of positions
        raise UserError(
            f"A {config.model_type} has positions for {most:,} tokens, and rows here may have {longest:,}. Set "
            f"data.max_length to {most} or less."
        )
    if getattr(config, "attn_logit_softcapping", None) is not None and longest > _LONGEST_CAPPED:
        raise UserError(
            f"A {config.model_type} caps its scores, and each layer holds tokens × tokens of them: rows here may have "
            f"{longest:,} tokens. Set data.max_length to {_LONGEST_CAPPED} or less."
        )
    for each in (rope, *rope.values()):  # some have parameters for each type of layer
        kind = each.get("rope_type") if isinstance(each, Mapping) else None
        limit = most if kind in ("dynamic", "longrope") else None
        if kind == "longrope":
            limit = each.get("original_max_position_embeddings", limit)
        if limit is not None and longest > limit:
            raise UserError(
                f"This base scales its rotary embedding ({kind}) by the longest row of a batch if that has more than "
                f"{limit:,} tokens, and rows here may have {longest:,}: the same row would be trained differently in "
                f"each batch. Set data.max_length to {limit} or less."
            )
