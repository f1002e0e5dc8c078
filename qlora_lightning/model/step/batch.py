"""A flat batch: its rows, where they are from, and the parts in which it goes through the model.

Gradients are of sums, so that it does not matter how a batch is cut.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from qlora_lightning.model.step.layout import IGNORED, BatchBound, Layout
from qlora_lightning.support.errors import UserError

# The tensors of a flat batch.
_PER_TOKEN = ("input_ids", "position_ids", "labels")
_PER_ROW = ("row_ids", "source", "desirable")
# Types whose positions are a table.
_LEARNED_POSITIONS = (
    "gpt2",
    "gpt_bigcode",
    "gpt-sw3",
    "gpt_neo",
    "opt",
    "biogpt",
    "ctrl",
    "openai-gpt",
    "codegen",
    "gptj",
)
_NAMED = 8  # rows in a message


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


def format_locations(locations: Sequence[str]) -> str:
    """Join locations for a message, the first few of them."""
    more = f" and {len(locations) - _NAMED} more" if len(locations) > _NAMED else ""
    return (", ".join(locations[:_NAMED]) or "unknown") + more


def is_flat(batch: Any) -> bool:
    """Whether a batch is one flat stream whose rows are known."""
    required = {"input_ids", "position_ids", "labels", "cu_seqlens", "row_ids", "source"}
    return isinstance(batch, Mapping) and required <= batch.keys()


def cut_into_rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cut a flat batch into one of each row, as if it came alone; one of another kind is not cut: no rows."""
    if not is_flat(batch):
        return []
    cu_seqlens = batch["cu_seqlens"].tolist()
    return [slice_samples(batch, *samples, cu_seqlens) for samples in cut_samples(batch, cu_seqlens, max_tokens=0)]


def cut_samples(batch: Mapping[str, Any], cu_seqlens: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """Cut a flat batch into parts of whole rows, in their order; a row of preferences is a pair of samples.

    Args:
        batch: The batch.
        cu_seqlens: Where its samples begin, and the last one ends.
        max_tokens: Of a part; a row alone may have more.

    Returns:
        The first sample of each part, and the one behind its last.
    """
    tensors = {name for name, each in batch.items() if isinstance(each, torch.Tensor)}
    if tensors - {*_PER_TOKEN, *_PER_ROW, "cu_seqlens"}:  # a collate function's own, of which nobody says how it is cut
        return [(0, len(cu_seqlens) - 1)]
    size, parts, first = 2 if batch.get("pairs") else 1, [], 0
    for row in range(size, len(cu_seqlens) - 1, size):
        if cu_seqlens[row + size] - cu_seqlens[first] > max_tokens:
            parts.append((first, row))
            first = row
    return [*parts, (first, len(cu_seqlens) - 1)]


def slice_samples(batch: Mapping[str, Any], first: int, last: int, cu_seqlens: Sequence[int]) -> dict[str, Any]:
    """Return the flat batch of samples ``first`` to ``last``, the latter excluded; tensors are views of the batch's."""
    start, end = cu_seqlens[first], cu_seqlens[last]
    part = dict(batch)
    part |= {name: batch[name][:, start:end] for name in _PER_TOKEN}
    part |= {name: batch[name][first:last] for name in _PER_ROW if name in batch}
    part["cu_seqlens"] = batch["cu_seqlens"][first : last + 1] - start
    part["longest"] = max(after - before for before, after in itertools.pairwise(cu_seqlens[first : last + 1]))
    return part


@dataclass(frozen=True, eq=False)
class MicroBatches(BatchBound):
    """A flat batch, cut into parts of whole rows.

    Attributes:
        cu_seqlens: Where the batch's samples begin, and the last one ends: on the host.
        samples: The first sample of each part, and the one behind its last.
        layouts: Of each part.
        max_tokens: That a part was to have.
    """

    cu_seqlens: list[int]
    samples: list[tuple[int, int]]
    layouts: list[Layout]
    max_tokens: int

    def to(self, device: torch.device, non_blocking: bool = True) -> Self:
        """Move to a device, as Lightning moves a batch."""
        return dataclasses.replace(self, layouts=[each.to(device, non_blocking) for each in self.layouts])

    def parts(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the parts of a batch, each a flat batch with its ``layout``."""
        found = []
        for (first, last), layout in zip(self.samples, self.layouts, strict=True):
            part = dict(batch) if len(self.samples) == 1 else slice_samples(batch, first, last, self.cu_seqlens)
            part.pop("micro_batches", None)
            found.append({**part, "layout": layout.bind(part)})
        return found


def cut_batch(
    batch: Mapping[str, Any], max_tokens: int, lay_out: Callable[[Mapping[str, Any]], Layout]
) -> MicroBatches:
    """Cut a flat batch: best before it moves to a GPU, whose numbers would have to be waited for.

    ``lay_out`` makes the layout of a part; the rest is as in :func:`cut_samples`.
    """
    cu_seqlens = batch["cu_seqlens"].tolist()
    samples = cut_samples(batch, cu_seqlens, max_tokens)
    layouts = [lay_out(slice_samples(batch, *each, cu_seqlens)) for each in samples]
    return MicroBatches(cu_seqlens, samples, layouts, max_tokens)


def filler_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first row without labels: an empty pass for a process that has fewer micro-batches than others."""
    cu_seqlens = batch["cu_seqlens"].tolist()
    first = slice_samples(batch, 0, 2 if batch.get("pairs") else 1, cu_seqlens)
    labels, row_ids = torch.full_like(first["labels"], IGNORED), torch.full_like(first["row_ids"], -1)
    return {name: each for name, each in first.items() if name != "micro_batches"} | {
        "labels": labels,
        "row_ids": row_ids,
    }


def check_row_length(config: Any, longest: int) -> None:
    """Refuse rows that are too long: for a table of positions, or since their angles would depend on the longest one.

    The rotary types ``dynamic`` (NTK) and ``longrope`` scale all angles by a row that is beyond the length of the
    base's pre-training.
    """
    if config.model_type in _LEARNED_POSITIONS and longest > config.max_position_embeddings:
        raise UserError(
            f"A {config.model_type} has positions for {config.max_position_embeddings:,} tokens, and rows here may "
            f"have {longest:,}. Set data.max_length to {config.max_position_embeddings} or less."
        )
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
