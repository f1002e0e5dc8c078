"""A packed batch, as a data module collates it, or made of a padded one: its rows, and parts of whole rows."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from qlora_lightning.model.step.layout import MicroBatch, lay_out
from qlora_lightning.sources.tensors import IGNORED
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import say_once

# The tensors that a packed batch may have.
_PER_TOKEN = ("input_ids", "position_ids", "labels")
_PER_ROW = ("row_ids", "source", "desirable")
_OF_ALL = ("cu_seqlens", "kl")
# Those of a padded batch, as the collators of transformers make it; the last two may be missing.
_PADDED = ("input_ids", "labels", "attention_mask", "position_ids")
# What collators add that these say already, the first five only beside position_ids.
_SAMPLE_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_LENGTHS = ("length", "seq_lengths")
_MAX_LISTED = 8  # rows in a message


def samples_of(data: Any, split: str | None) -> Any:
    """Return the samples of a split if the data module is ours; another's ``samples`` may be anything."""
    splits = getattr(data, "samples", None)
    return splits.get(split) if isinstance(splits, dict) else None


def row_locations(data: Any, row_ids: Iterable[int], split: str | None = "train") -> list[str]:
    """Return where rows are from: ``train.jsonl:17``, or ``row 16`` if the data module, or ``None``, does not know.

    ``row_ids`` number the rows of their split; negative ones are fillers and skipped.
    """
    samples = samples_of(data, split)
    locations = []
    for row_id in dict.fromkeys(row_ids):
        if row_id < 0:
            continue
        indices = [] if samples is None else np.flatnonzero(samples.row_ids == row_id)[:1].tolist()
        locations.append(samples.where(indices[0]) if indices else f"row {row_id}")
    return locations


def format_locations(locations: Sequence[str]) -> str:
    """Join locations for a message, the first few of them."""
    suffix = f" and {len(locations) - _MAX_LISTED} more" if len(locations) > _MAX_LISTED else ""
    return (", ".join(locations[:_MAX_LISTED]) or "unknown") + suffix


def is_packed(batch: Any) -> bool:
    """Whether a batch is one stream of samples that can be cut into rows: not if a collate function adds tensors."""
    if not isinstance(batch, Mapping):
        return False
    tensors = {name for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return {*_PER_TOKEN, "cu_seqlens"} <= tensors <= {*_PER_TOKEN, *_PER_ROW, *_OF_ALL}


def is_padded(batch: Any) -> bool:
    """Whether a batch has rows side by side: ``input_ids`` and ``labels``, and no bounds of a packed stream."""
    given = _given(batch)
    return "cu_seqlens" not in given and {"input_ids", "labels"} <= given.keys()


def pack_padded(batch: Any, only_known: bool = True) -> Any:
    """Return a padded batch as a packed one, on the host; a batch of another kind is returned as it is.

    A padded batch has ``input_ids``, ``labels`` and usually ``attention_mask``, ``(rows, tokens)``, as the collators of
    transformers make it. Rows may be padded on either side. What the mask leaves out is not computed, so a sum over
    rows is that of packed samples. Each row is a sample; one whose ``position_ids`` restart, as packed by other tools,
    is several. ``only_known``: nobody reads other keys.

    Raises:
        UserError: One is not of this shape, the mask has other values than 0 and 1, or leaves out tokens inside a row,
            or another key would be ignored.
    """
    if not is_padded(batch):
        return batch
    given = _given(batch)
    known = (*_PADDED, *_LENGTHS, *(_SAMPLE_BOUNDS if "position_ids" in given else ()))
    unknown = [str(name) for name, value in given.items() if name not in known and not _is_zero(name, value)]
    if only_known and unknown:
        raise UserError(
            f"A padded batch has {unknown[0]}, which nothing would read: expected {', '.join(_PADDED)}. Leave it out "
            "in the collate function, or override compute_loss, which gets the batch as it is.",
            "data.batch",
        )
    given = {name: given[name] for name in _PADDED if name in given}
    if other := [name for name, value in given.items() if not isinstance(value, torch.Tensor)]:
        kind = type(given[other[0]]).__name__
        raise UserError(f"A padded batch has {other[0]} as {kind}: expected a tensor, as input_ids.", "data.batch")
    tensors = {name: value.cpu() for name, value in given.items()}
    ids, labels = tensors["input_ids"], tensors["labels"]
    if ids.ndim != 2:
        raise UserError(f"A padded batch has input_ids {tuple(ids.shape)}: expected (rows, tokens).", "data.batch")
    for name, tensor in tensors.items():
        if tensor.shape != ids.shape and not (name == "position_ids" and tensor.shape == (1, ids.shape[1])):
            shapes = f"{tuple(tensor.shape)}: expected {tuple(ids.shape)}"
            raise UserError(f"A padded batch has {name} {shapes}, as input_ids.", "data.batch")
    mask = tensors.get("attention_mask", torch.ones_like(ids))
    is_token = mask.bool()
    n_spans = (F.pad(is_token, (1, 0)).int().diff(dim=1) > 0).sum(1)  # of each row
    if ((mask != 0) & (mask != 1)).any() or (n_spans > 1).any() or not is_token.any():
        raise UserError(
            "attention_mask of a padded batch: expected 1 for the tokens of a row, one after the other, and 0 for "
            "padding before or after them. Samples in one row are told apart by position_ids that restart at 0.",
            "data.batch",
        )
    positions = tensors.get("position_ids", is_token.cumsum(1) - 1).expand_as(ids)[is_token]
    rows, _ = is_token.nonzero(as_tuple=True)
    is_start = F.pad((rows.diff() != 0) | (positions.diff() <= 0), (1, 0), value=True)
    cu_seqlens = F.pad(is_start.nonzero()[:, 0], (0, 1), value=len(rows)).int()
    return {
        "input_ids": ids[is_token][None],
        "position_ids": positions[None],
        "labels": labels[is_token].masked_fill(is_start, IGNORED)[None],
        "cu_seqlens": cu_seqlens,
    }


def _given(batch: Any) -> dict[Any, Any]:
    return {name: value for name, value in batch.items() if value is not None} if isinstance(batch, Mapping) else {}


def _is_zero(name: Any, value: Any) -> bool:
    """Whether these are the types of tokens of a tokenizer that has one type."""
    return name == "token_type_ids" and isinstance(value, torch.Tensor) and not value.any()


def samples_per_row(batch: Mapping[str, Any]) -> int:
    """Return the number of samples of a row: 2 for a preference pair, else 1."""
    return 2 if batch.get("pairs") else 1


def cut_into_rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cut a packed batch into one batch per row."""
    return cut_batch(batch, max_tokens=0)


def cut_batch(batch: Mapping[str, Any], max_tokens: int) -> list[dict[str, Any]]:
    """Cut a packed batch into parts of whole rows, in their order, each a packed batch.

    A part has at most ``max_tokens``; a single row may have more.
    """
    cu_seqlens, row_size, parts, start = batch["cu_seqlens"].tolist(), samples_per_row(batch), [], 0
    for sample in range(row_size, len(cu_seqlens) - 1, row_size):
        if cu_seqlens[sample + row_size] - cu_seqlens[start] > max_tokens:
            parts.append(_slice_samples(batch, start, sample, cu_seqlens))
            start = sample
    return [*parts, _slice_samples(batch, start, len(cu_seqlens) - 1, cu_seqlens)]


def _slice_samples(batch: Mapping[str, Any], start: int, end: int, cu_seqlens: Sequence[int]) -> dict[str, Any]:
    """Return the packed batch of samples ``start`` to ``end``, which is excluded; tensors are views of the batch's."""
    tokens = slice(cu_seqlens[start], cu_seqlens[end])
    part = dict(batch) | {name: batch[name][:, tokens] for name in _PER_TOKEN}
    part |= {name: batch[name][start:end] for name in _PER_ROW if name in batch}
    part["cu_seqlens"] = batch["cu_seqlens"][start : end + 1] - tokens.start
    return part


class Budget(Protocol):
    """What a cutter takes of a :class:`~qlora_lightning.model.memory.budget.TokenBudget`."""

    tokens: int

    def record(self, part: Mapping[str, Any]) -> None:
        """Record that a part fitted into memory."""

    def lower(self, shortage: Any, cutter: Any) -> None:
        """Take less memory than a part took."""


class Sharded(Protocol):
    """What it takes of a :class:`~qlora_lightning.model.sharded.ShardedBase`."""

    def largest(self, number: int) -> int:
        """Return the largest of all processes' numbers."""


@dataclass(frozen=True)
class Cutter:
    """Cuts packed batches on the host into parts that fit into memory, and makes each part a micro-batch.

    Attributes:
        causal_lm: The model of transformers that computes them.
        device: Where it does.
        budget: Has the most tokens of a part.
        sharded_base: A base whose passes take all processes, which then have equally many parts; or ``None``.
        skips_unlabelled: See :func:`~qlora_lightning.model.step.layout.lay_out`.
        locate: Returns where rows are from, by their ids.
    """

    causal_lm: Any
    device: torch.device
    budget: Budget
    sharded_base: Sharded | None
    skips_unlabelled: bool
    locate: Callable[[Sequence[int]], str]

    def cut(self, batch: Any) -> list[Any]:
        """Cut a packed batch into parts of whole rows; a batch of another kind is its only part."""
        if not is_packed(batch):
            if isinstance(batch, Mapping) and "cu_seqlens" in batch:
                _report_whole(", ".join(map(str, batch)))
            return [batch]
        parts = cut_batch(batch, self.budget.tokens)
        if self.sharded_base is not None:
            parts += [dummy_row(batch)] * (self.sharded_base.largest(len(parts)) - len(parts))
        return parts

    def lay_out(self, batch: Mapping[str, Any]) -> MicroBatch:
        """Lay a packed batch out as one micro-batch, on the device.

        Raises:
            UserError: The batch is of another kind, a token is not one of the base's, or a row is too long for it.
        """
        check_packed(batch, len(self.causal_lm.get_input_embeddings().weight), self.locate)
        micro_batch = lay_out(batch, skips_unlabelled=self.skips_unlabelled)
        check_row_length(self.causal_lm.config, micro_batch.sequences.longest)
        return micro_batch.to(self.device)


@functools.cache
def _report_whole(names: str) -> None:
    """Print, once, why batches with tensors of these names are not cut."""
    say_once(
        f"A batch has {names}: tensors of your own are not cut into rows, so it goes through the model as a whole, and "
        "data.batch_size decides its memory, not model.micro_batch_tokens."
    )


def first_labelled_row(batch: Any, repeats: int = 1) -> Any:
    """Return the batch of the first row with a label, several times; ``None`` for a batch that is not of rows."""
    if is_packed(batch):
        rows = [row for row in cut_into_rows(batch) if (row["labels"] != IGNORED).any()]
        return _repeat_packed(rows[0], repeats) if rows else None
    if not is_padded(batch):
        return None
    given, n_rows = _given(batch), len(batch["input_ids"])
    if not all(isinstance(value, torch.Tensor | list) and len(value) == n_rows for value in given.values()):
        return None
    labels: torch.Tensor = given["labels"]
    first = (labels != IGNORED).view(n_rows, -1).any(1).nonzero()[:1, 0]
    if not len(first):
        return None
    indices = [int(first)] * repeats
    part: dict[str, Any] = {}
    for name, value in given.items():
        part[name] = [value[n] for n in indices] if isinstance(value, list) else value[indices]
    kind: Any = type(batch)  # as that of a tokenizer, whose keys are attributes too
    return kind(part)


def _repeat_packed(row: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """Return the packed batch of a row several times."""
    n_tokens, ends = row["input_ids"].shape[1], row["cu_seqlens"][1:]
    repeated = dict(row) | {name: row[name].repeat(1, repeats) for name in _PER_TOKEN}
    repeated |= {name: row[name].repeat(repeats) for name in _PER_ROW if name in row}
    repeated["cu_seqlens"] = torch.cat([row["cu_seqlens"][:1], *(ends + n * n_tokens for n in range(repeats))])
    return repeated


def dummy_row(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first row without labels: an empty pass for a process that has fewer micro-batches than others."""
    row = _slice_samples(batch, 0, samples_per_row(batch), batch["cu_seqlens"].tolist())
    rows = len(row["cu_seqlens"]) - 1
    return {**row, "labels": torch.full_like(row["labels"], IGNORED), "row_ids": torch.full((rows,), -1)}


def check_packed(batch: Mapping[str, Any], vocabulary: int, locate: Callable[[Sequence[int]], str]) -> None:
    """Reject a batch that is no packed one, and a token id that is not a row of the embedding.

    A stop token at the end of a row is never embedded: only the loss would meet it, as a label.
    """
    if not isinstance(batch, Mapping) or any(isinstance(value, Mapping) for value in batch.values()):
        raise UserError(
            f"A batch is a {type(batch).__name__}, as CombinedLoader makes it of several, and a step takes one packed "
            "batch: name several sources in data.train, or override compute_loss, which gets a batch as it is.",
            "data.batch",
        )
    expected = ("input_ids", "labels", "position_ids", "cu_seqlens")
    if missing := [name for name in expected if batch.get(name) is None]:
        raise UserError(
            f"A batch has {', '.join(map(str, batch)) or 'nothing'}, and no {missing[0]}: expected one packed stream "
            "of samples without padding, as InstructionDataModule makes it, or a padded batch with input_ids, "
            "attention_mask and labels of shape (rows, tokens), or your own compute_loss.",
            "data.batch",
        )
    if other := [name for name in expected if not isinstance(batch[name], torch.Tensor)]:
        kind = type(batch[other[0]]).__name__
        raise UserError(f"A batch has {other[0]} as {kind}: expected a tensor.", "data.batch")
    token_ids = batch["input_ids"][0]
    position = ((token_ids < 0) | (token_ids >= vocabulary)).nonzero()[:1, 0]  # of the first one, if there is one
    if not len(position):
        labels = batch["labels"][0]
        is_wrong = (labels != IGNORED) & ((labels < 0) | (labels >= vocabulary))
        if is_wrong.any():
            raise UserError(
                f"A batch has the label {int(labels[is_wrong][0]):,}: expected ids of tokens below {vocabulary:,}, and "
                f"{IGNORED} for what is not trained.",
                "data.batch",
            )
        return
    sample = int(torch.searchsorted(batch["cu_seqlens"].to(position), position, right=True)) - 1
    row_ids = [] if batch.get("row_ids") is None else batch["row_ids"][sample : sample + 1].tolist()
    raise UserError(
        f"A token{f' of {locate(row_ids)}' if row_ids else ''} has the id {int(token_ids[position]):,}, and the base "
        f"has embeddings only for ids below {vocabulary:,}: the tokenizer has tokens that the base lacks, such as a "
        "stop token. Use the base's own tokenizer, or a base whose embedding was resized for this one.",
        "data.tokenizer",
    )


def most_positions(config: Any) -> int | None:
    """Return how many positions a base has, or was pre-trained on; MPT has another name for it."""
    names = ("max_position_embeddings", "max_seq_len")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), None)


def check_row_length(config: Any, longest: int) -> None:
    """Reject rows that are too long: for a table of positions, or because angles would depend on the longest row.

    The rotary types ``dynamic`` (NTK) and ``longrope`` scale all angles of a batch by a row that is longer than those
    of the base's pre-training.
    """
    rope, n_positions = getattr(config, "rope_parameters", None) or {}, most_positions(config)
    limits: list[tuple[int | None, str]] = []
    if not rope:
        limits.append((n_positions, "has a table of positions"))
    if getattr(config, "attn_logit_softcapping", None) is not None:  # 1 GiB in a layer of Gemma 2 9B, in float32
        limits.append((4096, "caps its scores, of which each layer holds tokens × tokens"))
    for parameters in (rope, *rope.values()):  # some have parameters for each type of layer
        rope_type = parameters.get("rope_type") if isinstance(parameters, Mapping) else None
        limit = n_positions if rope_type in ("dynamic", "longrope") else None
        if rope_type == "longrope":
            limit = parameters.get("original_max_position_embeddings", limit)
        limits.append((limit, f"scales its rotary embedding ({rope_type}) by the longest row of a batch beyond that"))
    for limit, reason in limits:
        if limit is not None and longest > limit:
            raise UserError(
                f"A {config.model_type} takes rows of {limit:,} tokens, and rows here may have {longest:,}: it "
                f"{reason}. Set data.max_length to {limit} or less.",
                "data.max_length",
            )
