"""What of a micro-batch is computed, and where it is: made once, on the host, before the batch moves to the device.

In a causal model a token's states depend on it and on those before it. So no loss depends on what comes behind the last
token from which something is predicted; and where samples begin with the same tokens (a system prompt, definitions of
tools, a prompt with several answers), their states are the same and their gradients are added up: they are computed
once. (Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing", have it for pairs.)
Nothing in forward or backward reads a number from the device: whatever Python must know is here.

An example: the samples ``1 2 3 7 8`` and ``1 2 3 5 6``, in which only the last token has a label::

    input_ids        7 1 2 3 5            1 2 3 are computed with the second sample; 8 and 6 are only predicted
    position_ids     3 0 1 2 3
    predict_index    0 4                  places in the stream; targets 8 6
    bounds           0 4 8                of the expanded samples, 1 2 3 7 and 1 2 3 5
    cu_seqlens_q     0 1 5                of the first sample only 7 has a query
    gather_index     1 2 3 0  1 2 3 4     where in the stream each expanded token comes from
    expanded_index   3  0 4  1 5  2 6  7  expanded tokens by place in the stream: 7 is the fourth, 1 the first and fifth
    expanded_offsets 0 1 3 5 7 8          where in expanded_index those of each place begin, and the end of the last
    first_expanded   3 0 1 2 7            the first of those of each place

Attention takes its states by ``gather_index``; their gradients are added up over ``expanded_index``.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lightning.base.tensors import IGNORED

_MIN_SHARED_RATIO = 32  # one token in so many: fewer are not worth that attention looks them up

IntArray = npt.NDArray[np.int64]


def next_labels(labels: Tensor) -> Tensor:
    """Return the target of each token of a stream ``(tokens,)``: the label of the next one; the last has none.

    The one place where labels are shifted. A sample's first token has no label, so nothing is predicted across samples.
    """
    return F.pad(labels[1:], (0, 1), value=IGNORED)


class _DeviceMovable:
    """Goes to a device with all its tensors, as Lightning moves a batch, and without waiting for them."""

    def to(self, device: torch.device) -> Self:
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                # to a GPU from pinned memory, which alone is copied in the background
                pinned = value.pin_memory() if device.type == "cuda" and not value.is_cuda else value
                moved[field.name] = pinned.to(device, non_blocking=True)
            elif isinstance(value, _DeviceMovable):
                moved[field.name] = value.to(device)
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Expansion(_DeviceMovable):
    """Expands the stream to every token of its samples, some of which share tokens.

    Attributes:
        gather_index: Where in the stream each expanded token comes from, int64.
        expanded_index: The expanded tokens by their place in the stream.
        expanded_offsets: Where in ``expanded_index`` those of each place begin, and the last ends: ``(tokens + 1,)``.
        first_expanded: The first of those of each place, ``(tokens,)``.
        has_shared: Whether a place has more than one.
    """

    gather_index: Tensor
    expanded_index: Tensor
    expanded_offsets: Tensor
    first_expanded: Tensor
    has_shared: bool


@dataclass(frozen=True, eq=False)
class Samples(_DeviceMovable):
    """Where the tokens of samples are in a stream; what attention must know.

    Attributes:
        bounds: Where the tokens of each sample begin among those of all samples, and the end of the last.
        cu_seqlens: The same for a kernel, int32.
        cu_seqlens_q: Where the queries of each sample begin in the stream: a shared token has one for all its samples.
        expanded: Every token of each sample, sample after sample.
    """

    bounds: tuple[int, ...]
    cu_seqlens: Tensor
    cu_seqlens_q: Tensor
    expanded: Expansion

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(end - start for start, end in itertools.pairwise(self.bounds))


@dataclass(frozen=True, eq=False)
class Layout(_DeviceMovable):
    """The stream that is computed of a batch.

    It notices if the batch has changed: a subclass or callback may put other labels in.

    Attributes:
        input_ids: ``(1, tokens)``.
        position_ids: ``(1, tokens)``.
        predict_index: From which tokens something is predicted, ``(K,)``; samples in the order of the batch.
        targets: What is predicted from each, ``(K,)``.
        counts: How many are predicted of each sample.
        samples: Where samples are.
        lengths: How many tokens each sample has in the batch.
        rows: The ids of the batch's rows.
        origin: The batch's tensors, and the version of each: torch counts what is written in place.
    """

    input_ids: Tensor
    position_ids: Tensor
    predict_index: Tensor
    targets: Tensor
    counts: tuple[int, ...]
    samples: Samples
    lengths: tuple[int, ...]
    rows: tuple[int, ...] = ()
    origin: tuple[tuple[Tensor, int], ...] = ()

    def bind(self, batch: Mapping[str, Any]) -> Self:
        """Remember the batch, once it has moved."""
        return dataclasses.replace(self, origin=_versions(batch))

    def matches(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch is still what this was made from."""
        pairs = zip(self.origin, _versions(batch), strict=False)
        return bool(self.origin) and all(a is b and before == now for (a, before), (b, now) in pairs)


def _versions(batch: Mapping[str, Any]) -> tuple[tuple[Tensor, int], ...]:
    tensors = [batch[name] for name in ("input_ids", "position_ids", "labels", "cu_seqlens")]
    return tuple((each, 0 if each.is_inference() else each._version) for each in tensors)


@dataclass(frozen=True)
class ComputedTokens:
    """What of the samples of a batch is computed.

    Attributes:
        lengths: How many tokens of each sample, from its first, something is predicted from; at least 1.
        shared: How many of these another sample begins with too, which computes them.
        order: Samples sorted by their tokens; each may share a beginning with the one before it. Empty where none does.
    """

    lengths: list[int]
    shared: list[int]
    order: list[int]

    @property
    def count(self) -> int:
        """Number of computed tokens."""
        return sum(self.lengths) - sum(self.shared)

    def gather_index(self) -> IntArray:
        """Return where among the computed tokens each one of a sample is, sample after sample."""
        ends = np.cumsum(np.subtract(self.lengths, self.shared)).tolist()
        places = [np.arange(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]
        for before, sample in itertools.pairwise(self.order):
            places[sample][: self.shared[sample]] = places[before][: self.shared[sample]]
        return np.concatenate(places)


def lay_out(batch: Mapping[str, Any], *, skips_unlabelled: bool = True) -> Layout:
    """Lay a flat batch out for the model.

    Args:
        batch: ``input_ids``, ``position_ids``, ``labels`` ``(1, tokens)`` and ``cu_seqlens`` ``(samples + 1,)``. On a
            GPU already, it is read from there, which makes the host wait.
        skips_unlabelled: Whether tokens that no label needs are left out, and shared beginnings computed once: the
            loss and its gradients are the same. Else all tokens are computed.
    """
    bounds = batch["cu_seqlens"].tolist()
    starts = bounds[:-1]
    ids, positions, labels = (batch[name][0].cpu().numpy() for name in ("input_ids", "position_ids", "labels"))
    targets = next_labels(torch.from_numpy(labels)).numpy()
    counts = np.add.reduceat(targets != IGNORED, starts, dtype=np.int64).tolist()
    computed = ComputedTokens(np.diff(bounds).tolist(), [0] * len(starts), [])
    if skips_unlabelled:
        states = ids + (positions.astype(np.int64) << 32)  # at another position a token has another state
        computed = find_computed(np.split(states, starts[1:]), np.split(targets != IGNORED, starts[1:]))
        spans = zip(starts, computed.shared, computed.lengths, strict=True)
        places = np.concatenate([np.arange(start + shared, start + length) for start, shared, length in spans])
        ids, positions, targets = ids[places], positions[places], targets[places]
    (predict_index,) = (targets != IGNORED).nonzero()
    return Layout(
        torch.from_numpy(ids)[None],
        torch.from_numpy(positions)[None],
        torch.from_numpy(predict_index),
        torch.from_numpy(targets[predict_index]),
        tuple(counts),
        build_samples(computed),
        tuple(np.diff(bounds).tolist()),
        () if batch.get("row_ids") is None else tuple(batch["row_ids"].tolist()),
    )


def build_samples(computed: ComputedTokens) -> Samples:
    """Find where samples are in the stream of their computed tokens."""
    gather_index, bounds = computed.gather_index(), [0, *np.cumsum(computed.lengths).tolist()]
    own = np.cumsum(np.subtract(computed.lengths, computed.shared)).tolist()
    cu_seqlens, cu_seqlens_q = (torch.tensor(each, dtype=torch.int32) for each in (bounds, [0, *own]))
    expanded_index = np.argsort(gather_index, kind="stable")
    offsets = np.searchsorted(gather_index[expanded_index], np.arange(computed.count + 1))
    expanded = Expansion(
        torch.from_numpy(gather_index),
        torch.from_numpy(expanded_index),
        torch.from_numpy(offsets),
        torch.from_numpy(expanded_index[offsets[:-1]]),
        has_shared=len(gather_index) != computed.count,
    )
    return Samples(tuple(bounds), cu_seqlens, cu_seqlens_q, expanded)


def samples_of_lengths(lengths: Sequence[int]) -> Samples:
    """Find where samples are that are computed whole, one behind the other."""
    return build_samples(ComputedTokens(list(lengths), [0] * len(lengths), []))


def find_computed(
    tokens: Sequence[npt.NDArray[np.integer]], predicts: Sequence[npt.NDArray[np.bool_]]
) -> ComputedTokens:
    """Find what of the samples of a batch must be computed.

    Args:
        tokens: Of each sample, a number for each token; where they are the same, so are the states.
        predicts: From which of them something is predicted.
    """
    predict_index = [np.flatnonzero(each).tolist() for each in predicts]
    lengths = [places[-1] + 1 if places else 1 for places in predict_index]
    shareable = [places[0] if places else 0 for places in predict_index]
    # Whatever order sorts by the first token that differs: neighbours have most in common.
    order = sorted(range(len(tokens)), key=lambda sample: tokens[sample].tobytes())
    shared = [0] * len(tokens)
    for before, sample in itertools.pairwise(order):
        most = min(shareable[sample], lengths[before])
        differ = np.flatnonzero(tokens[before][:most] != tokens[sample][:most])
        shared[sample] = int(differ[0]) if len(differ) else most
    if _MIN_SHARED_RATIO * sum(shared) < sum(lengths):
        shared = [0] * len(tokens)
    return ComputedTokens(lengths, shared, order)


def add_noise(embeddings: Tensor, samples: Samples, alpha: float) -> Tensor:
    """Add NEFTune's noise to each token's embedding: ``U(-1, 1) · alpha / sqrt(L · width)``.

    L is the length of the token's sample, as in Jain et al. 2023 (algorithm 1); their code takes that of the padded
    batch. Drawn from torch's generator of the device, as dropout is.

    Args:
        embeddings: ``(1, tokens, width)``.
        samples: Of the stream.
        alpha: Strength.
    """
    lengths = samples.cu_seqlens.diff()
    token_lengths = lengths.repeat_interleave(lengths, output_size=embeddings.shape[1])  # (tokens,)
    scale = alpha / (token_lengths * embeddings.shape[2]).float().sqrt()
    noise = torch.empty_like(embeddings, dtype=torch.float32).uniform_(-1, 1).mul_(scale[:, None])
    return embeddings + noise.to(embeddings.dtype)
