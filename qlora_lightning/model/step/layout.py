"""A micro-batch: the tokens of a part of a batch that are computed, and where they are. It is made on the host.

In a causal model the states of a token depend on it and on the tokens before it. So no loss depends on tokens after the
last one that predicts a label. If samples begin with the same tokens (a system prompt, tool definitions, a prompt with
several answers), these have the same states and their gradients add up: they are computed once. (Wang and Hegde 2024,
"Accelerating Direct Preference Optimization with Prefix Sharing", do it for pairs.)
Nothing in forward or backward reads a number from the device: all that Python must know is here.

An example: the samples ``1 2 3 7 8`` and ``1 2 3 5 6``, in which only the last token has a label::

    input_ids        7 1 2 3 5            1 2 3 are computed with the second sample; 8 and 6 are only predicted
    position_ids     3 0 1 2 3
    predict_index    0 4                  stream indices; targets 8 6
    bounds           0 4 8                of the expanded samples, 1 2 3 7 and 1 2 3 5
    cu_seqlens_q     0 1 5                in the first sample only 7 has a query
    gather_index     1 2 3 0  1 2 3 4     stream index of each expanded token
    expanded_index   3  0 4  1 5  2 6  7  expanded tokens by stream index: 7 is the fourth, 1 the first and fifth
    expanded_offsets 0 1 3 5 7 8          where in expanded_index those of each stream index begin, and the last end
    first_expanded   3 0 1 2 7            the first of those of each stream index

Attention gathers its states by ``gather_index``; their gradients are summed over ``expanded_index``. Layers with a
state gather theirs side by side (:class:`SampleGroups`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qlora_lightning.sources.tensors import IGNORED

_MIN_SHARED_RATIO = 32  # share one token in so many, or none: less does not pay for gathering
MOST_PADDING = 0.25  # of a group of samples side by side


class _DeviceMovable:
    """A dataclass that moves to a device with all its tensors, without waiting for them; itself if it is there."""

    def to(self, device: torch.device) -> Self:
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.device != device:
                # only from pinned memory does a GPU copy in the background
                pinned = value.pin_memory() if device.type == "cuda" and not value.is_cuda else value
                changes[field.name] = pinned.to(device, non_blocking=True)
            elif isinstance(value, _DeviceMovable) and (moved := value.to(device)) is not value:
                changes[field.name] = moved
        return dataclasses.replace(self, **changes) if changes else self  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Expansion(_DeviceMovable):
    """Expands the stream to every token of its samples, some of which share tokens.

    Attributes:
        gather_index: Stream index of each expanded token, int64.
        expanded_index: The expanded tokens, sorted by stream index.
        expanded_offsets: Bounds of those of each stream index in ``expanded_index``, ``(tokens + 1,)``.
        first_expanded: The first of those of each stream index, ``(tokens,)``.
        has_shared: Whether a stream index has more than one.
    """

    gather_index: Tensor
    expanded_index: Tensor
    expanded_offsets: Tensor
    first_expanded: Tensor
    has_shared: bool


@dataclass(frozen=True, eq=False)
class SampleGroups(_DeviceMovable):
    """Samples of similar lengths side by side, padded on the right, for layers whose state runs through a row.

    A causal layer computes the same for a sample, whatever follows it.

    Attributes:
        shapes: Samples and tokens, padding included, of each group.
        expanded: Expands the stream to all groups, one after the other. Padding repeats the last token of its sample.
        is_stream: Whether they are the stream as it is: one group, without padding or shared tokens.
    """

    shapes: tuple[tuple[int, int], ...]
    expanded: Expansion
    is_stream: bool


@dataclass(frozen=True, eq=False)
class SequenceBounds(_DeviceMovable):
    """Where the tokens of each sample are in a stream, for layers that look at other tokens.

    Attributes:
        bounds: Where each sample begins among the expanded tokens, and where the last ends.
        cu_seqlens: The same for a kernel, int32.
        cu_seqlens_q: Where the queries of each sample begin in the stream: a shared token has one for all its samples.
        expanded: Every token of each sample, sample after sample.
        gather_index: ``expanded.gather_index`` on the host.
    """

    bounds: tuple[int, ...]
    cu_seqlens: Tensor
    cu_seqlens_q: Tensor
    expanded: Expansion
    gather_index: npt.NDArray[np.int64]

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(end - start for start, end in itertools.pairwise(self.bounds))

    @functools.cached_property
    def groups(self) -> SampleGroups:
        """The samples in groups of similar lengths, on the device of the bounds; made when a layer asks for them."""
        starts, lengths = np.array(self.bounds[:-1]), np.diff(self.bounds)
        groups = group_by_length(lengths.tolist())
        shapes = tuple((len(group), int(lengths[group[0]])) for group in groups)
        places = [
            starts[group, None] + np.minimum(np.arange(tokens), lengths[group, None] - 1)
            for group, (_, tokens) in zip(groups, shapes, strict=True)
        ]
        index = self.gather_index[np.concatenate([each.ravel() for each in places])]
        count = len(self.expanded.first_expanded)
        made = SampleGroups(shapes, expand(index, count), len(index) == count and len(groups) == 1)
        return made.to(self.cu_seqlens.device)

    @functools.cached_property
    def sample_index(self) -> Tensor:
        """The number of the sample of each expanded token, ``(1, n_expanded)``, int32."""
        numbers = torch.arange(len(self.bounds) - 1, dtype=torch.int32, device=self.cu_seqlens.device)
        return numbers.repeat_interleave(self.cu_seqlens.diff(), output_size=self.bounds[-1])[None]


@dataclass(frozen=True, eq=False)
class MicroBatch(_DeviceMovable):
    """A part of a packed batch as the model computes it; ``compute_loss`` gets it.

    Attributes:
        input_ids: The computed tokens, ``(1, n_tokens)``.
        position_ids: Their positions, ``(1, n_tokens)``.
        sequences: Where samples are among them.
        predict_index: The tokens that predict a label, ``(K,)``; samples in the order of the batch.
        targets: The label that each predicts, ``(K,)``.
        counts: How many of these each sample has.
        rows: The ids of its rows, -1 for a dummy row; empty if the batch has none.
        pairs: Whether two samples, the answers of a preference pair, are a row.
        desirable: The verdict on each row's answer, ``(rows,)``; ``None`` if there are none.
        kl: For ``kto`` the divergence that the whole batch estimates.
    """

    input_ids: Tensor
    position_ids: Tensor
    sequences: SequenceBounds
    predict_index: Tensor
    targets: Tensor
    counts: tuple[int, ...]
    rows: tuple[int, ...]
    pairs: bool = False
    desirable: Tensor | None = None
    kl: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """The label that each computed token predicts, ``(1, n_tokens)``; -100 for none. They are shifted already."""
        labels = torch.full_like(self.input_ids, IGNORED)
        labels[0, self.predict_index] = self.targets
        return labels

    def replace_targets(self, targets: Tensor) -> Self:
        """Return the same with other labels to predict, ``(K,)``."""
        if targets.shape != self.targets.shape:
            raise ValueError(f"Targets have the shape {tuple(targets.shape)}: expected {tuple(self.targets.shape)}.")
        return dataclasses.replace(self, targets=targets)


@dataclass(frozen=True)
class ComputedTokens:
    """The computed tokens of a batch's samples.

    Attributes:
        lengths: Number of tokens of each sample up to the last that predicts a label; at least 1.
        shared: How many of these are computed with another sample, which begins with them too.
        order: Samples sorted by their tokens; each may share a beginning with the one before it. Empty if none does.
    """

    lengths: list[int]
    shared: list[int]
    order: list[int]

    @property
    def count(self) -> int:
        """Number of computed tokens."""
        return sum(self.lengths) - sum(self.shared)

    def gather_index(self) -> npt.NDArray[np.int64]:
        """Return the index of each sample's tokens among the computed ones, sample after sample."""
        ends = np.cumsum(np.subtract(self.lengths, self.shared)).tolist()
        indices = [np.arange(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]
        for previous, sample in itertools.pairwise(self.order):
            indices[sample][: self.shared[sample]] = indices[previous][: self.shared[sample]]
        return np.concatenate(indices)


def lay_out(batch: Mapping[str, Any], *, skips_unlabelled: bool = True) -> MicroBatch:
    """Lay a packed batch out for the model.

    Args:
        batch: ``input_ids``, ``position_ids``, ``labels`` ``(1, tokens)`` and ``cu_seqlens`` ``(samples + 1,)``. If it
            is on a GPU, the host waits to read it.
        skips_unlabelled: Whether tokens that no label needs are skipped, and shared beginnings computed once: loss and
            gradients are the same. Else all tokens are computed.
    """
    bounds = batch["cu_seqlens"].tolist()
    starts, lengths = bounds[:-1], np.diff(bounds).tolist()
    ids, positions, labels = (batch[name][0].cpu().numpy() for name in ("input_ids", "position_ids", "labels"))
    targets = np.roll(labels, -1)  # the label of the next token: labels are shifted only here
    targets[np.subtract(bounds[1:], 1)] = IGNORED  # nothing is predicted across samples
    counts = np.add.reduceat(targets != IGNORED, starts, dtype=np.int64).tolist()
    computed = ComputedTokens(lengths, [0] * len(starts), [])
    if skips_unlabelled:
        token_keys = ids + (positions.astype(np.int64) << 32)  # a token's state depends on its position too
        computed = find_computed(np.split(token_keys, starts[1:]), np.split(targets != IGNORED, starts[1:]))
        spans = zip(starts, computed.shared, computed.lengths, strict=True)
        index = np.concatenate([np.arange(start + shared, start + length) for start, shared, length in spans])
        ids, positions, targets = ids[index], positions[index], targets[index]
    (predict_index,) = (targets != IGNORED).nonzero()
    return MicroBatch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        sequences=bound_sequences(computed),
        predict_index=torch.from_numpy(predict_index),
        targets=torch.from_numpy(targets[predict_index]),
        counts=tuple(counts),
        rows=() if batch.get("row_ids") is None else tuple(batch["row_ids"].tolist()),
        pairs=bool(batch.get("pairs")),
        desirable=batch.get("desirable"),
        kl=batch.get("kl"),
    )


def bound_sequences(computed: ComputedTokens) -> SequenceBounds:
    """Return where the samples of a stream of computed tokens are."""
    gather_index, bounds = computed.gather_index(), [0, *np.cumsum(computed.lengths).tolist()]
    bounds_q = [0, *np.cumsum(np.subtract(computed.lengths, computed.shared)).tolist()]
    cu_seqlens, cu_seqlens_q = torch.tensor(bounds, dtype=torch.int32), torch.tensor(bounds_q, dtype=torch.int32)
    expanded = expand(gather_index, computed.count)
    return SequenceBounds(tuple(bounds), cu_seqlens, cu_seqlens_q, expanded, gather_index)


def expand(gather_index: npt.NDArray[np.int64], count: int) -> Expansion:
    """Return the expansion of a stream of ``count`` tokens to those of an index."""
    expanded_index = np.argsort(gather_index, kind="stable")
    offsets = np.searchsorted(gather_index[expanded_index], np.arange(count + 1))
    return Expansion(
        torch.from_numpy(gather_index),
        torch.from_numpy(expanded_index),
        torch.from_numpy(offsets),
        torch.from_numpy(expanded_index[offsets[:-1]]),
        has_shared=len(gather_index) != count,
    )


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Group samples of similar lengths, the longest first: of each group little is padding."""
    groups: list[list[int]] = []
    tokens = 0  # of the last group
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        longest, size = (lengths[groups[-1][0]], len(groups[-1]) + 1) if groups else (0, 0)
        if groups and size * longest <= (1 + MOST_PADDING) * (tokens + lengths[sample]):
            groups[-1].append(sample)
            tokens += lengths[sample]
        else:
            groups.append([sample])
            tokens = lengths[sample]
    return groups


def sequences_of_lengths(lengths: Sequence[int]) -> SequenceBounds:
    """Return where samples are that are computed whole, one after the other."""
    return bound_sequences(ComputedTokens(list(lengths), [0] * len(lengths), []))


def find_computed(
    tokens: Sequence[npt.NDArray[np.integer]], predicts: Sequence[npt.NDArray[np.bool_]]
) -> ComputedTokens:
    """Find which tokens of a batch's samples must be computed, by which of them predict a label.

    ``tokens`` are numbers for each sample's tokens; equal beginnings have equal states.
    """
    predict_index = [np.flatnonzero(mask).tolist() for mask in predicts]
    lengths = [indices[-1] + 1 if indices else 1 for indices in predict_index]
    shareable = [indices[0] if indices else 0 for indices in predict_index]
    # Any order by the first token that differs: neighbors share the longest beginnings.
    order = sorted(range(len(tokens)), key=lambda sample: tokens[sample].tobytes())
    shared = [0] * len(tokens)
    for previous, sample in itertools.pairwise(order):
        limit = min(shareable[sample], lengths[previous])
        mismatches = np.flatnonzero(tokens[previous][:limit] != tokens[sample][:limit])
        shared[sample] = int(mismatches[0]) if len(mismatches) else limit
    if _MIN_SHARED_RATIO * sum(shared) < sum(lengths):
        shared = [0] * len(tokens)
    return ComputedTokens(lengths, shared, order)


def add_noise(embeddings: Tensor, sequences: SequenceBounds, alpha: float) -> Tensor:
    """Add NEFTune's noise to each token's embedding, ``(1, tokens, width)``: ``U(-1, 1) · alpha / sqrt(L · width)``.

    L is the length of the token's sample, as in Jain et al. 2023 (algorithm 1); their code takes that of the padded
    batch. The noise is drawn from torch's generator of the device, like dropout.
    """
    lengths = sequences.cu_seqlens.diff()
    token_lengths = lengths.repeat_interleave(lengths, output_size=embeddings.shape[1])  # (tokens,)
    scale = alpha / (token_lengths * embeddings.shape[2]).float().sqrt()
    noise = torch.empty_like(embeddings, dtype=torch.float32).uniform_(-1, 1).mul_(scale[:, None])
    return embeddings + noise.to(embeddings.dtype)
