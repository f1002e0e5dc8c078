"""Attention over a flat batch: samples lie end to end in one stream, and each attends to itself alone.

:func:`flat_batch` says where the samples are: some models do not hand keywords on to their attention. Three ways lead
to the same numbers within rounding:

* on a CPU the C++ loops, which take all samples at once;
* on a card from compute capability 8.0 on, torch's kernel for ragged samples;
* else, and as the plain way, torch's attention for one sample after the other.

A sliding window that no sample is longer than changes nothing. A narrower one takes the ragged kernel or the last way,
with a mask.

Outside of it, as when transformers generates, this is torch's attention with transformers' mask.
"""
# mypy: allow-untyped-calls

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qlora_lightning.model.cpu.library import call, has_function, is_here
from qlora_lightning.model.step.layout import Expansion, Samples
from qlora_lightning.support.versions import attend_ragged

FLAT_ATTENTION = "qlora_flat"
# As attention_mask of a flat batch it keeps transformers from making one of (tokens, tokens) for its many samples.
NO_MASK = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
# What transformers may hand on, and needs not be computed here: none of it changes a flat batch's attention.
_HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "is_causal", "num_items_in_batch"}
_HARMLESS |= {"output_hidden_states", "return_dict", "position_embeddings", "logits_to_keep", "output_router_logits"}


class FlatBatch(NamedTuple):
    """What the layers of a model know of the flat batch that they compute.

    Attributes:
        samples: Where its samples are.
        casts: A and B of adapters in the dtype of the products, by the float32 ones; see
            :func:`~qlora_lightning.model.layers.decoder_layer.cast_adapters`.
        fast: ``False`` takes torch's attention, one sample after the other.
    """

    samples: Samples
    casts: Mapping[Tensor, Tensor] = MappingProxyType({})
    fast: bool = True


current_batch: ContextVar[FlatBatch | None] = ContextVar("current_batch", default=None)  # that is being computed


@contextlib.contextmanager
def flat_batch(batch: FlatBatch | None) -> Iterator[None]:
    """Compute a flat batch inside this context."""
    token = current_batch.set(batch)
    try:
        yield
    finally:
        current_batch.reset(token)


def recompute_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Return the contexts of torch's checkpoint: what is computed again in backward is of the same flat batch."""
    return contextlib.nullcontext(), flat_batch(current_batch.get())


def register_flat_attention() -> str:
    """Make flat attention known to transformers, and return the name for ``attn_implementation``.

    Registration is transformers' public way in: the model keeps its own code and calls our function by name.
    """
    AttentionInterface.register(FLAT_ATTENTION, flat_attention)
    AttentionMaskInterface.register(FLAT_ATTENTION, sdpa_mask)
    return FLAT_ATTENTION


def has_dropout(causal_lm: Any) -> bool:
    """Whether a model of transformers drops anything in training."""
    if any(each.p for each in causal_lm.modules() if isinstance(each, nn.Dropout)):
        return True
    settings = vars(causal_lm.config).items()  # some types call torch's function, with what their config says
    return any(each for name, each in settings if "drop" in name and isinstance(each, float))


def flat_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each sample of the stream, as transformers calls an attention.

    Args:
        module: The attention module that calls.
        query: Queries, ``(1, heads, tokens, head_dim)``.
        key: Keys, ``(1, kv_heads, tokens, head_dim)``.
        value: Values, ``(1, kv_heads, tokens, head_dim)``.
        attention_mask: ``(batch, 1, queries, keys)``, true where a query sees a key, or ``None``: causal. Not read in a
            flat batch.
        scaling: Factor on the scores; ``None`` means ``head_dim ** -0.5``.
        dropout: Probability with which attention weights are dropped.
        sliding_window: How many tokens each sees, itself and those right before it; ``None``: all before it. Outside of
            a flat batch the mask has it.
        kwargs: More that transformers hands on.

    Returns:
        attn_out ``(1, tokens, heads, head_dim)``, and no weights.

    Raises:
        RuntimeError: The model hands on what is not computed here, as attention sinks or a soft cap.
    """
    unknown = [name for name, each in kwargs.items() if each is not None and name not in _HARMLESS]
    if unknown:
        raise RuntimeError(f"{type(module).__name__} hands {unknown[0]} on to attention, which flat batches lack.")
    batch = current_batch.get()
    if batch is None:
        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        attn_out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return attn_out, None
    samples = batch.samples
    # as SDPA chooses it: under autocast what trains in float32 makes some states float32
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    if sliding_window is not None and sliding_window >= samples.longest:
        sliding_window = None
    is_fast, expanded = batch.fast and dropout == 0.0, samples.expanded
    if is_fast and sliding_window is None and has_cpu_kernel(query, key, value, dtype):
        query, key, value = (each.to(dtype) for each in (query, key, value))
        if expanded.has_shared:
            key, value = (_Expand.apply(each, expanded) for each in (key, value))
        return VarlenAttention.apply(query, key, value, samples, scaling), None
    if expanded.has_shared:
        query, key, value = (_Expand.apply(each, expanded) for each in (query, key, value))
    if is_fast and has_ragged_kernel(query, value):
        attn_out = attend_ragged(query, key, value, samples.cu_seqlens, samples.longest, scaling, sliding_window)
    else:
        attn_out = attend_per_sample(query, key, value, samples, scaling, dropout, sliding_window)
    # of a shared token the copies have the same result
    return attn_out.index_select(1, expanded.first_expanded) if expanded.has_shared else attn_out, None


def has_cpu_kernel(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> bool:
    """Whether the C++ loops take states ``(…, head_dim)`` in a dtype; bfloat16 takes a CPU with AVX512-BF16."""
    head_dim = value.shape[-1]
    if not query.shape[-1] == key.shape[-1] == head_dim:  # else they would read beyond
        return False
    return is_here(value) and head_dim % 16 == 0 and head_dim <= 256 and has_function("attend", dtype)


def has_ragged_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch has FlashAttention over ragged samples: from compute capability 8.0 on, in 16 bits.

    Its heads have one width, at most 256: those of Gemma 4's global layers are wider, those of MLA unlike.
    """
    width, device = query.shape[-1], query.device
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = width == value.shape[-1] and width <= 256 and width % 8 == 0
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)


class _Expand(torch.autograd.Function):
    """Compute ``states[:, :, gather_index]`` of a stream's states ``(1, heads, tokens, head_dim)``.

    Gradients of one token's copies are summed up in float32, in their order. The backward of an index would add them up
    in any order on CUDA, and round after each.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, expansion: Expansion) -> Tensor:
        ctx.expansion = expansion
        return states.transpose(1, 2).index_select(1, expansion.gather_index).transpose(1, 2)  # token after token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        expansion: Expansion = ctx.expansion
        by_token = grad[0].transpose(0, 1)  # (expanded tokens, heads, head_dim)
        offsets = expansion.expanded_offsets
        summed = F.embedding_bag(
            expansion.expanded_index, by_token.flatten(1), offsets, mode="sum", include_last_offset=True
        )
        return summed.view(-1, *by_token.shape[1:]).transpose(0, 1)[None], None


def attend_per_sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    samples: Samples,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    """Attend for one sample after the other by torch's SDPA; shapes are those of :func:`flat_attention`."""
    if query.is_cuda:  # where the kernels of older cards, and those with a mask, take no grouped heads
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    outputs = []
    for start, end in itertools.pairwise(samples.bounds):
        states, mask = (query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]), None
        if sliding_window is not None and sliding_window < end - start:
            mask = query.new_ones(end - start, end - start, dtype=torch.bool).tril().triu(1 - sliding_window)
        options: Any = {"is_causal": mask is None, "scale": scaling, "dropout_p": dropout, "enable_gqa": True}
        outputs.append(F.scaled_dot_product_attention(*states, mask, **options).transpose(1, 2))
    return torch.cat(outputs, dim=1)


class VarlenAttention(torch.autograd.Function):
    """Compute ``softmax(scale · Q Kᵀ + causal) V`` per sample by the C++ loops.

    On a CPU torch's flash kernel runs at a fraction of the speed of matrix products, one sample at a time. The loops
    keep no probabilities, but Q, K, V and the log-sum-exp of each row, from which backward computes them again (as in
    Dao et al. 2022, FlashAttention).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, samples: Samples, scaling: float | None) -> Tensor:
        query, key, value = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
        n_queries, n_keys = len(samples.expanded.first_expanded), samples.bounds[-1]
        assert (len(query), len(key)) == (n_queries, n_keys), "samples are of these tokens"  # else loops read beyond
        attn_out = torch.empty_like(query)  # (n_tokens, n_heads, head_dim)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)  # (n_tokens, n_heads)
        ctx.scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        sizes = len(samples.bounds) - 1, query.shape[1], *key.shape[1:]
        ctx.shape_args = samples.cu_seqlens_q, samples.cu_seqlens, *sizes
        call("attend", query.dtype, query, key, value, *ctx.shape_args, ctx.scale, attn_out, lse)
        ctx.save_for_backward(query, key, value, lse)
        return attn_out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, lse = ctx.saved_tensors
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        states = query, key, value, grad[0].contiguous(), lse
        call("attend_backward", query.dtype, *states, *ctx.shape_args, ctx.scale, *grads)
        return *(each.transpose(0, 1)[None] for each in grads), None, None
