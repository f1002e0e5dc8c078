"""Attention over a flat batch: samples lie end to end in one stream, and each attends to itself alone."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qlora_lightning.model.kernels import attention as kernel
from qlora_lightning.model.kernels.attention import Samples, can_attend
from qlora_lightning.model.layers.hooks import apply
from qlora_lightning.model.layers.kv_cache import KeyValueCache
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import attend_ragged


def sort_by_place(places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Give the tokens of the samples by their place in the stream, and where those of each of its places begin.

    Args:
        places: Where in the stream each token is, ``(tokens of samples,)``.
        count: Tokens of the stream; each has a place.
    """
    in_stream, order = places.sort(stable=True)
    return order, torch.searchsorted(in_stream, torch.arange(count, device=places.device))


def lay_out_samples(states: Tensor, places: Tensor, order: Tensor, begins: Tensor) -> Tensor:
    """Lay states ``(1, heads, tokens, head_dim)`` of a stream out for all tokens of its samples.

    Args:
        states: Of the stream.
        places: Where in it the tokens are.
        order: As :func:`sort_by_place` gives it.
        begins: Likewise.
    """
    return cast(Tensor, apply(_LayOut, states, places, order, begins))


class _LayOut(torch.autograd.Function):
    """``states[:, :, places]``; gradients of one token in several samples are summed up in float32, in their order.

    The backward of an index would add them up in any order on CUDA, and round after each.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor, order: Tensor, begins: Tensor) -> Tensor:
        ctx.save_for_backward(order, begins)
        return states.index_select(2, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        order, begins = ctx.saved_tensors
        _, heads, tokens, head_dim = grad.shape
        by_token = grad.transpose(1, 2).reshape(tokens, -1)
        summed = F.embedding_bag(order, by_token, begins, mode="sum")
        return summed.view(1, len(begins), heads, head_dim).transpose(1, 2), None, None, None


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


FLAT_ATTENTION, PLAIN_FLAT_ATTENTION = "qlora_flat", "qlora_flat_plain"
# As attention_mask of a flat batch it keeps transformers from making one of (tokens, tokens) for its many samples.
NO_MASK = torch.zeros(1, 1, 1, 1, dtype=torch.bool)


def register_flat_attention(fast: bool = True) -> str:
    """Make flat attention known to transformers, and return the name for ``attn_implementation``.

    Registration is transformers' public way in: the model keeps its own code and calls our function by name.

    Args:
        fast: ``False`` gives the name of torch's own attention, called for one sample after the other.
    """
    for name, attend in ((FLAT_ATTENTION, flat_attention), (PLAIN_FLAT_ATTENTION, plain_flat_attention)):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, sdpa_mask)
    return FLAT_ATTENTION if fast else PLAIN_FLAT_ATTENTION


def attends_flatly(causal_lm: Any) -> bool:
    """Whether a causal language model of transformers attends by one of these functions."""
    return causal_lm.config._attn_implementation in (FLAT_ATTENTION, PLAIN_FLAT_ATTENTION)


def check_attends_flatly(causal_lm: Any) -> None:
    """Refuse another attention for flat batches: it would take :data:`NO_MASK` at its word, and see no token at all.

    Raises:
        UserError: The model attends by another.
    """
    if not attends_flatly(causal_lm):
        raise UserError(
            f"The model attends by {causal_lm.config._attn_implementation!r}, which knows nothing of the samples of a "
            f"batch: expected {FLAT_ATTENTION!r} or {PLAIN_FLAT_ATTENTION!r}, set when the model is made. Does a "
            "callback or script call set_attn_implementation? Leave that out."
        )


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    stream_places: Tensor | None = None,
    kv_cache: KeyValueCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each sample of the stream; without ``cu_seqlens`` (generation) behave as plain SDPA.

    Args:
        module: The attention module that calls.
        query: Queries, ``(1, heads, tokens, head_dim)``.
        key: Keys, ``(1, kv_heads, tokens, head_dim)``.
        value: Values, ``(1, kv_heads, tokens, head_dim)``.
        attention_mask: Only read without ``cu_seqlens``.
        scaling: Factor on the scores; ``None`` means ``head_dim ** -0.5``.
        dropout: Probability with which attention weights are dropped.
        cu_seqlens: Where samples begin and the last one ends, ``(samples + 1,)``, int32.
        longest: Tokens of the longest sample.
        stream_places: Where in the stream the tokens of the samples are, ``(cu_seqlens[-1],)``, if it holds what they
            begin with in common once; ``None``: in order.
        kv_cache: Of rows that are being answered: takes in their prompts, then attends for one token of each.
        kwargs: Handed on to transformers' SDPA.

    Returns:
        The mixed values ``(1, tokens, heads, head_dim)``, and no weights.
    """
    if (mixed := _through_cache(kv_cache, module, query, key, value, scaling)) is not None:
        return mixed, None
    if cu_seqlens is not None and dropout == 0.0:
        mixed = _attend_by_loops(query, key, value, cu_seqlens, stream_places, scaling)
        if mixed is not None:
            return mixed, None
        if longest is not None and _has_varlen_kernel(query):
            attend = functools.partial(_attend_varlen, cu_seqlens=cu_seqlens, longest=longest, scaling=scaling)
            return _attend_in_full(attend, query, key, value, stream_places), None
    return plain_flat_attention(
        module, query, key, value, attention_mask, scaling, dropout, cu_seqlens, longest, stream_places, **kwargs
    )


def plain_flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    stream_places: Tensor | None = None,
    kv_cache: KeyValueCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as :func:`flat_attention` by torch's SDPA, for one sample after the other."""
    if (mixed := _through_cache(kv_cache, module, query, key, value, scaling)) is not None:
        return mixed, None
    if cu_seqlens is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output, None
    attend = functools.partial(_attend_per_sample, cu_seqlens=cu_seqlens, scaling=scaling, dropout=dropout)
    return _attend_in_full(attend, query, key, value, stream_places), None


def _attend_in_full(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, stream_places: Tensor | None
) -> Tensor:
    """Lay all tokens of the samples out, let them attend, and give what the stream holds of it."""
    if stream_places is None:
        return attend(query, key, value)
    order, begins = sort_by_place(stream_places, query.shape[2])
    whole = (lay_out_samples(each, stream_places, order, begins) for each in (query, key, value))
    return attend(*whole).index_select(1, order[begins])  # one of each place: all are the same


def _through_cache(
    kv_cache: KeyValueCache | None, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor | None:
    """Let a cache attend for single tokens; it takes in prompts, which attend to themselves, and gives nothing."""
    if kv_cache is None:
        return None
    if kv_cache.decoding:
        return kv_cache.attend(module.layer_idx, query, key, value, scaling)
    kv_cache.fill(module.layer_idx, key, value)
    return None


def _has_varlen_kernel(query: Tensor) -> bool:
    """FlashAttention over ragged samples: CUDA cards of compute capability 8.0 and newer, in 16 bits."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, longest: int, scaling: float | None
) -> Tensor:
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))  # (tokens, heads, head_dim)
    return attend_ragged(query, key, value, cu_seqlens, longest, scaling)[None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_by_loops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    stream_places: Tensor | None,
    scaling: float | None,
) -> Tensor | None:
    """Attend by the C++ loops; ``None`` where they cannot run."""
    # As SDPA does under autocast, where what trains in float32 makes some of them float32.
    autocasts = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocasts else value.dtype
    if not can_attend(value, dtype):
        return None
    samples = find_samples(cu_seqlens.tolist(), query.shape[2], stream_places)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_within(samples, query.to(dtype), key.to(dtype), value.to(dtype), scale)


def _attend_per_sample(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention
    bounds = cu_seqlens.tolist()
    outputs = [
        attend(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            is_causal=True,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=True,
        )
        for start, end in itertools.pairwise(bounds)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()
