"""Attention over a flat batch: samples lie end to end in one stream, and each attends to itself alone.

The keyword ``samples``, which transformers hands on to here, describes a batch's samples
(:class:`~qlora_lightning.model.step.layout.Samples`). Four ways lead to the same numbers within rounding:

* on a CPU the C++ loops, which take all samples at once and find in the stream what several begin with;
* on a card from compute capability 8.0 on, torch's kernel for ragged samples;
* on an older card one causal kernel over samples that are padded on the right: no query of a sample sees what is behind
  it, so there is no mask;
* else, and as the plain way, torch's attention for one sample after the other.

A sliding window that no sample is longer than changes nothing. A narrower one takes the ragged kernel or the last way,
with a mask; a soft cap on the scores (Gemma 2) takes the last way, by products.
"""
# mypy: allow-untyped-calls

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qlora_lightning.model.cpu.library import call, has_numbers, is_there
from qlora_lightning.model.layers.kv_cache import KeyValueCache
from qlora_lightning.model.step.layout import Expansion, Samples, whole_samples
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import attend_ragged

FLAT_ATTENTION, PLAIN_FLAT_ATTENTION = "qlora_flat", "qlora_flat_plain"
# As attention_mask of a flat batch it keeps transformers from making one of (tokens, tokens) for its many samples.
NO_MASK = torch.zeros(1, 1, 1, 1, dtype=torch.bool)


def register_flat_attention(fast: bool = True) -> str:
    """Make flat attention known to transformers, and return the name for ``attn_implementation``.

    Registration is transformers' public way in: the model keeps its own code and calls our function by name.

    Args:
        fast: ``False`` returns the name of torch's own attention, called for one sample after the other.
    """
    for name, attend in ((FLAT_ATTENTION, flat_attention), (PLAIN_FLAT_ATTENTION, plain_flat_attention)):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, sdpa_mask)
    return FLAT_ATTENTION if fast else PLAIN_FLAT_ATTENTION


def attends_flatly(causal_lm: Any) -> bool:
    """Whether a causal language model of transformers attends by one of these functions."""
    return causal_lm.config._attn_implementation in (FLAT_ATTENTION, PLAIN_FLAT_ATTENTION)


def check_attends_flatly(causal_lm: Any) -> None:
    """Refuse another attention for flat batches: it would take :data:`NO_MASK` at its word, and see no token at all."""
    if not attends_flatly(causal_lm):
        raise UserError(
            f"The model attends by {causal_lm.config._attn_implementation!r}, which knows nothing of the samples of a "
            f"batch: expected {FLAT_ATTENTION!r} or {PLAIN_FLAT_ATTENTION!r}, set when the model is made. Does a "
            "callback or script call set_attn_implementation? Leave that out."
        )


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def can_leave_out(causal_lm: Any, training: bool) -> bool:
    """Whether a model's states at a token are the same without the tokens behind it and in whichever sample it is.

    Not with attention that cannot look shared tokens up, nor where every sample is to drop inputs of its own.
    """
    return attends_flatly(causal_lm) and not (training and has_dropout(causal_lm))


def has_dropout(causal_lm: Any) -> bool:
    """Whether a model of transformers drops anything in training."""
    dropouts = (each.p for each in causal_lm.modules() if isinstance(each, _DROPOUTS))
    return any(dropouts) or bool(getattr(causal_lm.config, "attention_dropout", 0))


def flat_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    samples: Samples | None = None,
    kv_cache: KeyValueCache | None = None,
    cu_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    fast: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each sample of the stream, as transformers calls an attention.

    Args:
        module: The attention module that calls.
        query: Queries, ``(1, heads, tokens, head_dim)``.
        key: Keys, ``(1, kv_heads, tokens, head_dim)``.
        value: Values, ``(1, kv_heads, tokens, head_dim)``.
        attention_mask: Only read without ``samples``.
        scaling: Factor on the scores; ``None`` means ``head_dim ** -0.5``.
        dropout: Probability with which attention weights are dropped.
        samples: Where the samples are; without them (generation by transformers) this is torch's SDPA.
        kv_cache: Of rows that are being answered: takes in their prompts, then attends for one token of each.
        cu_seqlens: Of a flat batch that was not laid out, where each sample begins and the last one ends.
        sliding_window: How many tokens each sees, itself and those right before it; ``None``: all before it.
        softcap: Scores become ``softcap · tanh(score / softcap)``.
        fast: ``False`` takes torch's attention, one sample after the other.
        kwargs: Handed on to transformers' SDPA.

    Returns:
        The mixed values ``(1, tokens, heads, head_dim)``, and no weights.
    """
    if kv_cache is not None and kv_cache.decoding:
        return kv_cache.attend(module.layer_idx, query, key, value, scaling, sliding_window, softcap), None
    if kv_cache is not None:
        kv_cache.fill(module.layer_idx, key, value)
    if samples is None and cu_seqlens is not None:
        samples = whole_samples(cu_seqlens.diff().tolist()).to(cu_seqlens.device)
    if samples is None:
        options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, **kwargs}
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    # as SDPA chooses it: under autocast what trains in float32 makes some states float32
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    window = sliding_window if sliding_window is not None and sliding_window < samples.longest else None
    exact, is_causal = fast and dropout == 0.0 and softcap is None, window is None and softcap is None
    if exact and is_causal and has_loops(value, dtype):
        mixed = SampleAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype), samples, scaling)
    elif exact and has_ragged_kernel(query.device, query.dtype):
        attend = functools.partial(_attend_ragged, window=window)
        mixed = _attend_expanded(attend, query, key, value, samples, scaling)
    elif fast and is_causal and samples.padded is not None:
        mixed = _attend_padded(query, key, value, samples, samples.padded, scaling, dropout)
    else:
        attend = functools.partial(attend_per_sample, dropout=dropout, window=window, softcap=softcap)
        mixed = _attend_expanded(attend, query, key, value, samples, scaling)
    return mixed, None


def plain_flat_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Attend as :func:`flat_attention` by torch's SDPA, for one sample after the other."""
    return flat_attention(*args, fast=False, **kwargs)


def has_loops(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether the C++ loops take values ``(…, head_dim)`` in a dtype."""
    head_dim = value.shape[-1]
    return has_numbers(value) and head_dim % 16 == 0 and head_dim <= 256 and attends_in(dtype)


def attends_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has the loops in a dtype; in bfloat16 they take AVX512-BF16."""
    return is_there("attend", dtype)


def has_ragged_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has FlashAttention over ragged samples: from compute capability 8.0 on, in 16 bits."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _capability(device) >= (8, 0)


@functools.cache  # every layer of every step asks
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _attend_expanded(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, samples: Samples, scaling: float | None
) -> Tensor:
    """Let all tokens of samples that share some attend, and return one of each: the copies have the same result."""
    if not samples.expanded.shares:
        return attend(query, key, value, samples, scaling)
    expanded = (expand_states(each, samples.expanded) for each in (query, key, value))
    return attend(*expanded, samples, scaling).index_select(1, samples.expanded.first_copy)


def expand_states(states: Tensor, expansion: Expansion) -> Tensor:
    """Expand states ``(1, heads, tokens, head_dim)`` of a stream."""
    expanded: Tensor = _Expand.apply(states, expansion)
    return expanded


class _Expand(torch.autograd.Function):
    """``states[:, :, gather_index]``; gradients of one token's copies are summed up in float32, in their order.

    The backward of an index would add them up in any order on CUDA, and round after each.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, expansion: Expansion) -> Tensor:
        ctx.expansion = expansion
        return states.index_select(2, expansion.gather_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        expansion: Expansion = ctx.expansion
        if not expansion.shares:
            return grad.index_select(2, expansion.first_copy), None
        _, heads, _, head_dim = grad.shape
        by_token = grad[0].transpose(0, 1).flatten(1)  # (expanded tokens, heads · head_dim)
        offsets = expansion.copy_offsets
        summed = F.embedding_bag(expansion.copies, by_token, offsets, mode="sum", include_last_offset=True)
        return summed.view(-1, heads, head_dim).transpose(0, 1)[None], None


def _attend_ragged(
    query: Tensor, key: Tensor, value: Tensor, samples: Samples, scaling: float | None, window: int | None
) -> Tensor:
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))  # (tokens, heads, head_dim)
    return attend_ragged(query, key, value, samples.cu_seqlens, samples.longest, scaling, window)[None]


def _attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    samples: Samples,
    padded: Expansion,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    shape = len(samples.bounds) - 1, samples.longest

    def pad(states: Tensor) -> Tensor:
        """Return ``(samples, heads, longest, head_dim)``, heads as of queries: kernels for grouped ones are newer."""
        _, heads, _, head_dim = states.shape
        by_sample = expand_states(states, padded).view(heads, *shape, head_dim).transpose(0, 1)
        return by_sample.repeat_interleave(query.shape[1] // heads, dim=1)

    mixed = F.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), is_causal=True, scale=scaling, dropout_p=dropout
    )
    return mixed.transpose(1, 2).flatten(0, 1).index_select(0, padded.first_copy)[None]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it would compile again for each batch
def attend_per_sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    samples: Samples,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend for one sample after the other by torch's SDPA; with a soft cap by products."""
    outputs = []
    for start, end in itertools.pairwise(samples.bounds):
        states = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        mask = None
        if softcap is not None or (window is not None and window < end - start):
            mask = query.new_ones(end - start, end - start, dtype=torch.bool).tril()
            mask = mask if window is None else mask.triu(1 - window)
        if softcap is None:
            output = F.scaled_dot_product_attention(
                *states, mask, is_causal=mask is None, scale=scaling, dropout_p=dropout, enable_gqa=True
            )
        else:
            assert mask is not None
            output = _attend_capped(*states, mask, scaling, dropout, softcap)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _attend_capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, dropout: float, softcap: float
) -> Tensor:
    """Attend as transformers' eager attention does: torch's kernels have no soft cap."""
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, -torch.inf)
    weights = F.dropout(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value


class SampleAttention(torch.autograd.Function):
    """Compute ``softmax(scale · Q Kᵀ + causal) V`` per sample by the C++ loops.

    On a CPU torch's flash kernel runs at a fraction of the speed of matrix products, one sample at a time. The loops
    keep no probabilities, but Q, K, V and normalizers of each row: backward makes them again from the largest score and
    the sum of each row (as in Dao et al. 2022, FlashAttention).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, samples: Samples, scaling: float | None) -> Tensor:
        query, key, value = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
        found = len(samples.expanded.first_copy)
        if found != len(query):  # the loops would read beyond
            raise ValueError(f"samples: expected those of {len(query)} tokens, found {found}.")
        ctx.samples, ctx.scale = samples, float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        ctx.of_samples = samples.cu_seqlens.long(), samples.query_start, samples.expanded.gather_index
        ctx.heads = query.shape[1], *key.shape[1:]
        mixed, normalizers = torch.empty_like(query), query.new_empty(*query.shape[:2], 2, dtype=torch.float32)
        counts = len(samples.query_start), *ctx.heads
        call("attend", query.dtype, query, key, value, *ctx.of_samples, *counts, ctx.scale, mixed, normalizers)
        ctx.save_for_backward(query, key, value, normalizers)
        return mixed[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, normalizers = ctx.saved_tensors
        expanded: Expansion = ctx.samples.expanded
        tokens = len(expanded.gather_index) if expanded.shares else 0
        parts = key.new_empty(2 * tokens, *key.shape[1:], dtype=torch.float32)
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        states = query, key, value, grad[0].contiguous(), normalizers
        of_samples = *ctx.of_samples, expanded.copies, expanded.copy_offsets
        counts = len(ctx.samples.query_start), len(query), *ctx.heads
        call("attend_backward", query.dtype, *states, *of_samples, *counts, ctx.scale, parts, *grads)
        return *(each.transpose(0, 1)[None] for each in grads), None, None
