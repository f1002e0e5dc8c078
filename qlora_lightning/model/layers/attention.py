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

Without ``samples``, as when transformers generates, this is torch's attention with transformers' mask.
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

from qlora_lightning.model.cpu.library import call, has_function, has_numbers
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
        attention_mask: ``(batch, 1, queries, keys)``, true where a query sees a key, or ``None``: causal. Only read
            without ``samples``.
        scaling: Factor on the scores; ``None`` means ``head_dim ** -0.5``.
        dropout: Probability with which attention weights are dropped.
        samples: Where the samples are.
        cu_seqlens: Of a flat batch that was not laid out, where each sample begins and the last one ends.
        sliding_window: How many tokens each sees, itself and those right before it; ``None``: all before it. Without
            ``samples`` the mask has it.
        softcap: Scores become ``softcap · tanh(score / softcap)``.
        fast: ``False`` takes torch's attention, one sample after the other.
        kwargs: Handed on to transformers' SDPA.

    Returns:
        attn_out ``(1, tokens, heads, head_dim)``, and no weights.
    """
    if samples is None and cu_seqlens is not None:
        samples = whole_samples(cu_seqlens.diff().tolist()).to(cu_seqlens.device)
    if samples is None and softcap is not None:
        return _attend_capped(query, key, value, attention_mask, scaling, dropout, softcap).transpose(1, 2), None
    if samples is None:
        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        attn_out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return attn_out, None
    # as SDPA chooses it: under autocast what trains in float32 makes some states float32
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    window = sliding_window if sliding_window is not None and sliding_window < samples.longest else None
    exact, is_causal = fast and dropout == 0.0 and softcap is None, window is None and softcap is None
    if exact and is_causal and has_loops(value, dtype):
        attn_out = SampleAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype), samples, scaling)
    elif exact and has_ragged_kernel(query.device, query.dtype):
        attend = functools.partial(_attend_ragged, window=window)
        attn_out = _attend_expanded(attend, query, key, value, samples, scaling)
    elif fast and is_causal and samples.padded is not None:
        attn_out = _attend_padded(query, key, value, samples, samples.padded, scaling, dropout)
    else:
        attend = functools.partial(attend_per_sample, dropout=dropout, window=window, softcap=softcap)
        attn_out = _attend_expanded(attend, query, key, value, samples, scaling)
    return attn_out, None


def plain_flat_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Attend as :func:`flat_attention` by torch's SDPA, for one sample after the other."""
    return flat_attention(*args, fast=False, **kwargs)


def has_loops(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether the C++ loops take values ``(…, head_dim)`` in a dtype."""
    head_dim = value.shape[-1]
    return has_numbers(value) and head_dim % 16 == 0 and head_dim <= 256 and attends_in(dtype)


def attends_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has the loops in a dtype; in bfloat16 they take AVX512-BF16."""
    return has_function("attend", dtype)


def has_ragged_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has FlashAttention over ragged samples: from compute capability 8.0 on, in 16 bits."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and is_half and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_expanded(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, samples: Samples, scaling: float | None
) -> Tensor:
    """Let all tokens of samples that share some attend, and return one of each: the copies have the same result."""
    if not samples.expanded.shares:
        return attend(query, key, value, samples, scaling)
    expanded = (_Expand.apply(each, samples.expanded) for each in (query, key, value))
    return attend(*expanded, samples, scaling).index_select(1, samples.expanded.first_copy)


class _Expand(torch.autograd.Function):
    """Compute ``states[:, :, gather_index]`` of a stream's states ``(1, heads, tokens, head_dim)``.

    Gradients of one token's copies are summed up in float32, in their order. The backward of an index would add them up
    in any order on CUDA, and round after each.
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
        by_sample: Tensor = _Expand.apply(states, padded).view(heads, *shape, head_dim).transpose(0, 1)
        return by_sample.repeat_interleave(query.shape[1] // heads, dim=1)

    attn_out = F.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), is_causal=True, scale=scaling, dropout_p=dropout
    )
    return attn_out.transpose(1, 2).flatten(0, 1).index_select(0, padded.first_copy)[None]


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
        states, mask = (query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]), None
        if window is not None and window < end - start:
            mask = query.new_ones(end - start, end - start, dtype=torch.bool).tril().triu(1 - window)
        if softcap is None:
            output = F.scaled_dot_product_attention(
                *states, mask, is_causal=mask is None, scale=scaling, dropout_p=dropout, enable_gqa=True
            )
        else:
            output = _attend_capped(*states, mask, scaling, dropout, softcap)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _attend_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:
    """Attend as transformers' eager attention does: torch's kernels have no soft cap. Without a mask it is causal."""
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    if mask is None:  # the queries are of the last tokens
        n_queries, n_keys = query.shape[2], key.shape[2]
        mask = query.new_ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    lowest = torch.finfo(scores.dtype).min  # minus infinity would make a padded query, which sees nothing, NaN
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, lowest)
    probabilities = F.dropout(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), dropout)
    return probabilities @ value


class SampleAttention(torch.autograd.Function):
    """Compute ``softmax(scale · Q Kᵀ + causal) V`` per sample by the C++ loops.

    On a CPU torch's flash kernel runs at a fraction of the speed of matrix products, one sample at a time. The loops
    keep no probabilities, but Q, K, V and the log-sum-exp of each row, from which backward computes them again (as in
    Dao et al. 2022, FlashAttention).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, samples: Samples, scaling: float | None) -> Tensor:
        query, key, value = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
        n_tokens, n_heads, head_dim = query.shape
        n_expected = len(samples.expanded.first_copy)
        if n_expected != n_tokens:  # the loops would read beyond
            raise ValueError(f"samples: expected those of {n_tokens} tokens, found {n_expected}.")
        scale = float(head_dim**-0.5 if scaling is None else scaling)
        attn_out = torch.empty_like(query)  # (n_tokens, n_heads, head_dim)
        lse = query.new_empty(n_tokens, n_heads, 2, dtype=torch.float32)  # in two numbers, see attention.cpp
        places = samples.cu_seqlens.long(), samples.query_start, samples.expanded.gather_index
        sizes = len(samples.query_start), n_heads, *key.shape[1:]
        call("attend", query.dtype, query, key, value, *places, *sizes, scale, attn_out, lse)
        ctx.save_for_backward(query, key, value, lse)
        ctx.samples, ctx.places, ctx.scale = samples, places, scale
        return attn_out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, lse = ctx.saved_tensors
        expanded: Expansion = ctx.samples.expanded
        # of tokens that samples share, the gradients of keys and values by sample, before they are added up
        n_copies = len(expanded.gather_index) if expanded.shares else 0
        copies = key.new_empty(2 * n_copies, *key.shape[1:], dtype=torch.float32)
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        states = query, key, value, grad[0].contiguous(), lse
        places = *ctx.places, expanded.copies, expanded.copy_offsets
        sizes = len(ctx.samples.query_start), len(query), query.shape[1], *key.shape[1:]
        call("attend_backward", query.dtype, *states, *places, *sizes, ctx.scale, copies, *grads)
        return *(each.transpose(0, 1)[None] for each in grads), None, None
