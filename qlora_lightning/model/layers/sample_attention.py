"""Causal attention within each sample of a stream, by the C++ loops.

On a CPU torch's flash kernel runs at a fraction of the speed of matrix products, one sample at a time. The loops take
all samples at once, find in the stream what several begin with, and keep no probabilities: backward makes them again
from the largest score and the sum of each row (as in Dao et al. 2022, FlashAttention).
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lightning.model.kernels import attention as kernel
from qlora_lightning.model.kernels.attention import Samples
from qlora_lightning.model.layers.autograd import apply
from qlora_lightning.model.layers.whole_samples import sort_by_place


def attend_within(samples: Samples, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute ``softmax(scale · Q Kᵀ + causal) V`` per sample.

    Args:
        samples: Of the stream.
        query: ``(1, heads, tokens, head_dim)``.
        key: ``(1, kv_heads, tokens, head_dim)``.
        value: Likewise.
        scale: Factor on the scores.

    Returns:
        ``(1, tokens, heads, head_dim)``.
    """
    return cast(Tensor, apply(SampleAttention, query, key, value, samples, scale))


class SampleAttention(torch.autograd.Function):
    """As :func:`attend_within`, keeping Q, K, V and normalizers of each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, samples: Samples, scale: float) -> Tensor:
        query, key, value = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
        mixed, normalizers = kernel.attend(query, key, value, samples, scale)
        ctx.save_for_backward(query, key, value, normalizers)
        ctx.samples, ctx.scale = samples, scale
        return mixed[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, normalizers = ctx.saved_tensors
        grad = grad[0].contiguous()
        grads = kernel.attend_backward(query, key, value, grad, normalizers, ctx.samples, ctx.scale)
        of_query, of_key, of_value = (each.transpose(0, 1)[None] for each in grads)
        return of_query, of_key, of_value, None, None


def find_samples(bounds: Sequence[int], tokens: int, stream_places: Tensor | None) -> Samples:
    """Say where the tokens of samples are; all layers of a batch share it.

    Args:
        bounds: Where samples begin, and the end of the last.
        tokens: Of the stream.
        stream_places: Where in it each token of the samples is, ``(bounds[-1],)``; ``None``: in order.

    Raises:
        ValueError: The bounds do not rise from 0 to the number of places, or the places are not those of a stream in
            which each sample has its own tokens behind those that it shares, sample after sample.
    """
    places = None if stream_places is None else stream_places.numpy().tobytes()
    return _find_samples(tuple(bounds), tokens, places)


@functools.lru_cache(maxsize=4)
def _find_samples(bounds: tuple[int, ...], tokens: int, of_stream: bytes | None) -> Samples:
    in_order = torch.arange(tokens, device="cpu")
    places = in_order if of_stream is None else torch.frombuffer(bytearray(of_stream), dtype=torch.int64)
    check_bounds(bounds, len(places))
    starts = torch.tensor(bounds, device="cpu")
    ends = places[starts[1:] - 1] + 1
    own = starts.diff() - ends.diff(prepend=ends.new_zeros(1))
    of_own = [places[start:end] for start, end in zip((starts[:-1] + own).tolist(), bounds[1:], strict=True)]
    if (own < 0).any() or places.min() < 0 or not torch.equal(torch.cat(of_own), in_order):
        raise ValueError(f"stream_places: expected each of {tokens} places as the own token of one sample, in order.")
    order, begins = sort_by_place(places, tokens)
    return Samples(starts, own, places, order, torch.cat([begins, starts[-1:]]))


def check_bounds(bounds: Sequence[int], tokens: int) -> None:
    """Refuse bounds of samples that are none.

    Raises:
        ValueError: They do not rise from 0 to the tokens of the batch.
    """
    if bounds[0] != 0 or bounds[-1] != tokens or any(end <= start for start, end in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens}, the tokens of the batch; found {list(bounds)}.")
