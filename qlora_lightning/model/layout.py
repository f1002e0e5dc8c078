"""What of a micro-batch is computed, and where it lies: made once, on the host, before the batch moves to the device.

In a causal model a token's states depend on it and on those before it. So no loss depends on what comes behind the last
token from which something is predicted; and where samples begin with the same tokens (a system prompt, definitions of
tools, a prompt with several answers), their states are the same and their gradients are added up: computed once, they
do for all. (Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing", have it for pairs.)
Nothing in forward or backward reads a number from the device: whatever Python must know is here.
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

IGNORED = -100  # as a label: nothing is to be predicted
_LEAST_SHARED = 32  # one token in so many: fewer are not worth that attention looks them up
_ROWS = 16  # a CPU's products want whole blocks: with 1,711 rows some take a third longer than with 1,712 (measured)

_Numbers = npt.NDArray[np.int64]


def next_labels(labels: Tensor) -> Tensor:
    """Give the target of each token of a stream ``(tokens,)``: the label of the next one; the last has none.

    The one place where labels are shifted. A sample's first token has no label, so nothing is predicted across samples.
    """
    return F.pad(labels[1:], (0, 1), value=IGNORED)


class _Moves:
    """Goes to a device with all its tensors, as Lightning moves a batch."""

    def to(self, device: torch.device, non_blocking: bool = True) -> Self:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        moved = {
            name: each.to(device, non_blocking=non_blocking) for name, each in fields.items() if hasattr(each, "to")
        }
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Spread(_Moves):
    """Lays the stream out for every token of its samples, some of which share tokens, or fill samples up.

    Attributes:
        places: Where in the stream each token that is laid out comes from, int64.
        order: Those that count, by their place in the stream.
        begins: Where in ``order`` those of each place begin, and the end of the last: ``(tokens of the stream + 1,)``.
        first: The first of those of each place, ``(tokens of the stream,)``.
        once: Whether there is only that one.
    """

    places: Tensor
    order: Tensor
    begins: Tensor
    first: Tensor
    once: bool


@dataclass(frozen=True, eq=False)
class Samples(_Moves):
    """Where the tokens of samples are in a stream; what attention must know.

    Attributes:
        bounds: Where the tokens of each sample begin among those of all samples, and the end of the last.
        cu_seqlens: The same for a kernel, int32.
        own: From which of its tokens on each sample has queries: those before are computed with another sample.
        whole: Every token of each sample, sample after sample.
        padded: Every sample with as many tokens as the longest, ``(samples · longest,)``; only where it was asked for.
    """

    bounds: tuple[int, ...]
    cu_seqlens: Tensor
    own: Tensor
    whole: Spread
    padded: Spread | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(end - start for start, end in itertools.pairwise(self.bounds))


@dataclass(frozen=True, eq=False)
class Layout(_Moves):
    """The stream that is computed of a batch.

    Attributes:
        input_ids: ``(1, tokens)``.
        position_ids: ``(1, tokens)``.
        predicting: From which tokens something is predicted, ``(K,)``; samples in the order of the batch.
        targets: What is predicted from each, ``(K,)``.
        samples: Where samples lie.
        rows: The ids of the batch's rows.
        origin: The batch's tensors that it was made from, and the version of each; see :meth:`bind`.
    """

    input_ids: Tensor
    position_ids: Tensor
    predicting: Tensor
    targets: Tensor
    samples: Samples
    rows: tuple[int, ...] = ()
    origin: tuple[tuple[Tensor, int], ...] = ()

    def bind(self, batch: Mapping[str, Any]) -> Self:
        """Remember the batch that this is the layout of, once it has moved."""
        return dataclasses.replace(self, origin=_origin(batch))

    def is_of(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch is still what this was made from: a subclass may have put other labels into it."""
        pairs = zip(self.origin, _origin(batch), strict=False)
        return bool(self.origin) and all(a is b and before == now for (a, before), (b, now) in pairs)


def _origin(batch: Mapping[str, Any]) -> tuple[tuple[Tensor, int], ...]:
    tensors = [batch[name] for name in ("input_ids", "position_ids", "labels", "cu_seqlens")]
    return tuple((each, 0 if each.is_inference() else each._version) for each in tensors)


@dataclass(frozen=True)
class Needed:
    """What of the samples of a batch is computed.

    Attributes:
        seen: How many tokens of each sample, from its first, something is predicted from; at least 1.
        shared: How many of these another sample begins with too, which computes them.
        order: The samples, each behind the one that computes what it shares; empty where none does.
    """

    seen: list[int]
    shared: list[int]
    order: list[int]

    def kept(self, starts: Sequence[int]) -> _Numbers:
        """Give which tokens of the batch are computed, ``(K,)``; ``starts`` is where its samples begin."""
        spans = zip(starts, self.shared, self.seen, strict=True)
        return np.concatenate([np.arange(start + shared, start + seen) for start, shared, seen in spans])

    def places(self) -> _Numbers:
        """Give where among the computed tokens each one that a sample sees is, sample after sample."""
        ends = np.cumsum(np.subtract(self.seen, self.shared)).tolist()
        places = [np.arange(end - seen, end) for end, seen in zip(ends, self.seen, strict=True)]
        for before, sample in itertools.pairwise(self.order):
            places[sample][: self.shared[sample]] = places[before][: self.shared[sample]]
        return np.concatenate(places)


def lay_out(batch: Mapping[str, Any], *, leaves_out: bool = True, fills: bool = False, pads: bool = False) -> Layout:
    """Lay a flat batch out for the model.

    Args:
        batch: ``input_ids``, ``position_ids``, ``labels`` ``(1, tokens)`` and ``cu_seqlens`` ``(samples + 1,)``. On a
            GPU already, it is read from there, which makes the host wait.
        leaves_out: Whether tokens that no label needs are left out, and shared beginnings computed once: the loss and
            its gradients are the same. Else all tokens are computed.
        fills: Whether up to 15 more tokens, a sample of their own without labels, fill the stream up for a CPU's
            products. No result changes, but that dropout and NEFTune draw numbers for these tokens too.
        pads: Whether samples are laid out padded too: for attention that takes all of them in one kernel.
    """
    bounds, tokens = batch["cu_seqlens"].tolist(), batch["input_ids"].shape[1]
    if bounds[0] != 0 or bounds[-1] != tokens or any(end <= start for start, end in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens}, the tokens of the batch; found {bounds}.")
    starts = bounds[:-1]
    ids, positions, labels = (batch[name][0].cpu().numpy() for name in ("input_ids", "position_ids", "labels"))
    targets = next_labels(torch.from_numpy(labels)).numpy()
    needed = Needed(np.diff(bounds).tolist(), [0] * len(starts), [])
    if leaves_out:
        states = ids + (positions.astype(np.int64) << 32)  # at another position a token has another state
        needed = find_needed(np.split(states, starts[1:]), np.split(targets != IGNORED, starts[1:]))
        kept = needed.kept(starts)
        ids, positions, targets = ids[kept], positions[kept], targets[kept]
    filler = -len(ids) % _ROWS if fills else 0
    if filler:  # token 0 may be bad where it is never read
        ids, targets = np.append(ids, ids[-1:].repeat(filler)), np.append(targets, np.full(filler, IGNORED))
        positions = np.append(positions, np.arange(filler))
        needed = Needed([*needed.seen, filler], [*needed.shared, 0], needed.order)
    (predicting,) = (targets != IGNORED).nonzero()
    return Layout(
        torch.from_numpy(ids)[None],
        torch.from_numpy(positions)[None],
        torch.from_numpy(predicting),
        torch.from_numpy(targets[predicting]),
        place_samples(needed, pads=pads),
        () if batch.get("row_ids") is None else tuple(batch["row_ids"].tolist()),
    )


def place_samples(needed: Needed, *, pads: bool = False) -> Samples:
    """Find where samples are in the stream of what is needed of them; with ``pads`` lay them out padded too."""
    places, bounds = needed.places(), [0, *np.cumsum(needed.seen).tolist()]
    tokens, longest = sum(needed.seen) - sum(needed.shared), max(needed.seen)
    padded = None
    if pads:
        # A sample is filled up with its last token: no query of its own sees what is behind it.
        within = np.minimum(np.arange(longest), np.array(needed.seen)[:, None] - 1)  # (samples, longest)
        counts = np.arange(longest) < np.array(needed.seen)[:, None]
        padded = _spread(places[within + np.array(bounds[:-1])[:, None]].reshape(-1), counts.reshape(-1), tokens)
    return Samples(
        tuple(bounds),
        torch.tensor(bounds, dtype=torch.int32),
        torch.tensor(needed.shared),
        _spread(places, np.ones(len(places), dtype=np.bool_), tokens),
        padded,
    )


def whole_samples(lengths: Sequence[int]) -> Samples:
    """Find where samples are that are computed whole, one behind the other."""
    return place_samples(Needed(list(lengths), [0] * len(lengths), []))


def _spread(places: _Numbers, counts: npt.NDArray[np.bool_], tokens: int) -> Spread:
    (laid_out,) = counts.nonzero()
    order = laid_out[np.argsort(places[laid_out], kind="stable")]
    begins = np.searchsorted(places[order], np.arange(tokens + 1))
    tensors = [torch.from_numpy(each) for each in (places, order, begins, order[begins[:-1]])]
    return Spread(tensors[0], tensors[1], tensors[2], tensors[3], once=len(order) == tokens)


def find_needed(tokens: Sequence[npt.NDArray[np.integer]], predicts: Sequence[npt.NDArray[np.bool_]]) -> Needed:
    """Find what of the samples of a batch must be computed.

    Args:
        tokens: Of each sample, a number for each token; where they are the same, so are the states.
        predicts: From which of them something is predicted.
    """
    found = [np.flatnonzero(each).tolist() for each in predicts]
    seen = [places[-1] + 1 if places else 1 for places in found]
    shareable = [places[0] if places else 0 for places in found]
    # Whatever order sorts by the first token that differs: neighbours have most in common.
    order = sorted(range(len(tokens)), key=lambda sample: tokens[sample].tobytes())
    shared = [0] * len(tokens)
    for before, sample in itertools.pairwise(order):
        most = min(shareable[sample], seen[before])
        differ = np.flatnonzero(tokens[before][:most] != tokens[sample][:most])
        shared[sample] = int(differ[0]) if len(differ) else most
    if _LEAST_SHARED * sum(shared) < sum(seen):
        shared = [0] * len(tokens)
    return Needed(seen, shared, order)


def filled(tokens: int) -> int:
    """Give the tokens of a stream that is filled up."""
    return -(-tokens // _ROWS) * _ROWS


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
    of_token = lengths.repeat_interleave(lengths, output_size=embeddings.shape[1])  # (tokens,)
    scale = alpha / (of_token * embeddings.shape[2]).float().sqrt()
    noise = torch.empty_like(embeddings, dtype=torch.float32).uniform_(-1, 1).mul_(scale[:, None])
    return embeddings + noise.to(embeddings.dtype)
