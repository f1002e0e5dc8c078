"""Attention over a packed batch, in which samples follow each other in one stream and each attends only to itself.

:func:`packed_pass` sets where the samples are, because some models do not pass keywords on to their attention. Four
implementations agree to within rounding:

* on a CPU, C++ loops
* on a GPU, torch's FlashAttention
* on an older GPU or in float32, torch's memory-efficient kernels
* anywhere, torch's attention on one sample at a time

Outside :func:`packed_pass`, such as in ``generate``, transformers' own attention runs.
"""
# mypy: allow-untyped-calls

import contextlib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_lightning.model.cpu.library import call, find_function
from qlora_lightning.model.step.layout import Expansion, SequenceBounds

# Passed as the attention_mask of a packed batch, it keeps transformers from building a (tokens, tokens) mask over all
# samples.
NO_MASK = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
_RATE = re.compile("drop|jitter")  # in attention_dropout, embd_pdrop, layerdrop, router_jitter_noise, moe_jitter_eps
# Keywords from transformers to ignore, because none of them changes the attention of a packed batch.
_IGNORED = {"position_ids", "cache_position", "use_cache", "output_attentions", "num_items_in_batch"}
_IGNORED |= {"output_hidden_states", "return_dict", "position_embeddings", "logits_to_keep", "output_router_logits"}


class PackedPass(NamedTuple):
    """The packed batch that a model is computing, as its layers see it.

    Attributes:
        sequences: Where its samples are.
        layers: Layers that run fused; see :func:`~qlora_lightning.model.layers.decoder_layer.prepare_layers`.
        fused: ``False`` selects torch's attention, one sample at a time.
        recomputes: Whether backward is recomputing a checkpointed layer. The layer's output is then not read.
    """

    sequences: SequenceBounds
    layers: Mapping[nn.Module, Any] = MappingProxyType({})
    fused: bool = True
    recomputes: bool = False


class AttentionOptions(NamedTuple):
    """The options that an attention module requests.

    Attributes:
        scaling: Factor on the scores; ``None`` means ``head_dim ** -0.5``.
        dropout: Probability of dropping an attention weight.
        sliding_window: How many tokens each token sees, including itself; ``None`` means all tokens up to it.
        sinks: Attention sinks of gpt-oss, ``(heads,)``: the scores of a key that has no value.
    """

    scaling: float | None
    dropout: float = 0.0
    sliding_window: int | None = None
    sinks: Tensor | None = None


current_pass: ContextVar[PackedPass | None] = ContextVar("current_pass", default=None)  # being computed


@contextlib.contextmanager
def packed_pass(batch: PackedPass | None) -> Iterator[None]:
    """Make ``batch`` the current packed batch inside this context."""
    token = current_pass.set(batch)
    try:
        yield
    finally:
        current_pass.reset(token)


def recompute_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Return contexts for torch's checkpoint, so that backward recomputes with the same packed batch."""
    batch = current_pass.get()
    return contextlib.nullcontext(), packed_pass(None if batch is None else batch._replace(recomputes=True))


def is_stochastic(causal_lm: Any) -> bool:
    """Whether a transformers model draws random numbers in training, for dropout or for noise in front of a router."""
    modules = list(causal_lm.modules())
    if any(module.p for module in modules if isinstance(module, nn.Dropout)):
        return True
    # some types apply dropout or noise by functions: their rates are in the modules or in the config
    rates = (item for owner in (causal_lm.config, *modules) for item in vars(owner).items())
    unused = ("classifier", "summary")  # rates of heads that a causal language model does not have
    return any(
        value
        for name, value in rates
        if _RATE.search(name) and isinstance(value, float) and not name.startswith(unused)
    )


# Leave out cuDNN, which torch prefers on compute capability 9.0 and 10.0. It is not deterministic, and it makes a new
# plan for each new number of rows or tokens, which nearly every batch has. A plan takes 55 to 70 ms (as published).
@sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each sample of the stream; the signature is that of transformers' attention functions.

    Args:
        module: The calling attention module.
        query: Queries, ``(1, heads, tokens, head_dim)``.
        key: Keys, ``(1, kv_heads, tokens, head_dim)``.
        value: Values, ``(1, kv_heads, tokens, head_dim)``.
        attention_mask: ``(batch, 1, queries, keys)``, true where a query sees a key; ``None`` means causal. Ignored in
            a packed batch.
        scaling: See :class:`AttentionOptions`.
        dropout: See :class:`AttentionOptions`.
        sliding_window: See :class:`AttentionOptions`. Outside a packed batch, the mask already includes it.
        s_aux: The sinks of :class:`AttentionOptions`.
        kwargs: Further arguments from transformers.

    Returns:
        attn_out ``(1, tokens, heads, head_dim)``, and no weights.

    Raises:
        RuntimeError: If the model asks for something that this function does not compute, such as a soft cap.
    """
    reject_unsupported(type(module), kwargs)
    batch, options = current_pass.get(), AttentionOptions(scaling, dropout, sliding_window, s_aux)
    if batch is not None:
        query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
        return attend(query, key, value, batch, options).unsqueeze(0), None
    if s_aux is None:
        kwargs |= {"scaling": scaling, "dropout": dropout}
        attn_out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return attn_out, None
    if attention_mask is None:
        n_queries, n_keys = query.shape[2], key.shape[2]
        attention_mask = query.new_ones(1, 1, n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    return _sdpa_with_sinks(query, key, value, attention_mask, options).transpose(1, 2), None


def reject_unsupported(caller: type, options: Mapping[str, Any]) -> None:
    """Reject keywords from transformers that ask for something not computed here."""
    for name, argument in options.items():
        asks_for_more = not argument if name == "is_causal" else name not in _IGNORED
        if argument is not None and asks_for_more:
            raise RuntimeError(f"{caller.__name__} passes {name} to attention, which packed batches do not support.")


def attend(query: Tensor, key: Tensor, value: Tensor, batch: PackedPass, options: AttentionOptions) -> Tensor:
    """Attend within each sample of a packed batch.

    Query and result are ``(n_tokens, heads, head_dim)``, key and value ``(n_tokens, kv_heads, head_dim)``.
    """
    sequences, expanded = batch.sequences, batch.sequences.expanded
    # choose the dtype like SDPA: under autocast, float32 parameters such as a trained norm make some states float32
    device = value.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (states.to(dtype) for states in (query, key, value))
    window, sinks = options.sliding_window, options.sinks
    if window is not None and window >= sequences.longest:
        window, options = None, options._replace(sliding_window=None)
    is_fused, is_plain = batch.fused and options.dropout == 0.0, window is None and sinks is None
    takes_loops = is_fused and is_plain and has_cpu_kernel(query, key, value)
    if expanded.has_shared:
        key, value = (Expand.apply(states, expanded) for states in (key, value))
    if takes_loops:  # the loops compute the query of a shared token once
        return cast(Tensor, VarlenAttention.apply(query, key, value, sequences, options.scaling))
    if expanded.has_shared:
        query = Expand.apply(query, expanded)
    if is_fused and has_ragged_kernel(query, value) and (sinks is None or not sinks.requires_grad):
        attn_out: Tensor = RaggedAttention.apply(query, key, value, sequences, options)
    elif is_fused and is_plain and has_efficient_kernel(query):
        attn_out = EfficientAttention.apply(query, key, value, sequences, options.scaling)
    else:
        attn_out = attend_per_sample(query, key, value, sequences, options)
    # a shared token has the same result in each sample
    return attn_out.index_select(0, expanded.first_expanded) if expanded.has_shared else attn_out


def has_cpu_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the C++ loops support states ``(…, head_dim)`` of one dtype; bfloat16 needs a CPU with AVX512-BF16."""
    if type(value) not in (Tensor, nn.Parameter) or value.device.type != "cpu":  # the tensors of tracers have no data
        return False
    head_dim = value.shape[-1]
    if not query.shape[-1] == key.shape[-1] == head_dim:  # else the loops would read out of bounds
        return False
    return head_dim % 16 == 0 and head_dim <= 256 and find_function("attend", value.dtype) is not None


def has_ragged_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch's FlashAttention supports these ragged samples.

    It requires compute capability 8.0 or higher, a 16-bit dtype, and heads of one width, at most 256. The heads of
    Gemma 4's global layers are wider, and MLA has two widths.
    """
    width = query.shape[-1]
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = width == value.shape[-1] and width <= 256 and width % 8 == 0
    return fits and _capability(query.device) >= (8, 0)


def has_efficient_kernel(query: Tensor) -> bool:
    """Whether torch has memory-efficient attention over ragged samples: on a GPU, in any dtype and at any width."""
    return query.is_cuda


_capability = functools.cache(torch.cuda.get_device_capability)  # every layer asks for it


class Expand(torch.autograd.Function):
    """Compute ``states[gather_index]`` of a stream's states ``(n_tokens, heads, head_dim)``.

    Backward sums the gradients of a token's copies in float32, in a fixed order. On CUDA, the backward of indexing
    would sum them in any order and round after each one.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, expansion: Expansion) -> Tensor:
        ctx.expansion = expansion
        return states.index_select(0, expansion.gather_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # the gradient of the expanded tokens
        index, offsets = ctx.expansion.expanded_index, ctx.expansion.expanded_offsets
        grad_states = F.embedding_bag(index, grad.flatten(1), offsets, mode="sum", include_last_offset=True)
        return grad_states.view(-1, *grad.shape[1:]), None


def attend_per_sample(
    query: Tensor, key: Tensor, value: Tensor, sequences: SequenceBounds, options: AttentionOptions
) -> Tensor:
    """Attend to one sample at a time with torch's SDPA; shapes are those of :func:`attend`."""
    if query.is_cuda:  # kernels for older GPUs, and kernels with a mask, do not support grouped heads
        key, value = _repeat_heads(query, key, value)
    lengths = [end - start for start, end in itertools.pairwise(sequences.bounds)]
    outputs, window = [], options.sliding_window
    for sample in zip(*(states.split(lengths) for states in (query, key, value)), strict=True):
        q, k, v = (states.transpose(0, 1).unsqueeze(0) for states in sample)  # (1, heads, length, head_dim)
        length, mask = len(sample[0]), None
        if options.sinks is not None or (window is not None and window < length):
            mask = query.new_ones(length, length, dtype=torch.bool).tril().triu(1 - (window or length))
        if options.sinks is None:
            attn_out = F.scaled_dot_product_attention(
                q, k, v, mask, options.dropout, is_causal=mask is None, scale=options.scaling, enable_gqa=True
            )
        else:
            attn_out = _sdpa_with_sinks(q, k, v, cast(Tensor, mask)[None, None], options)
        outputs.append(attn_out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _sdpa_with_sinks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """Attend with one extra key and value of zeros after the others; the score of that key is the sink.

    ``mask`` is ``(…, queries, keys)``.
    """
    key, value = (F.pad(states, (0, 0, 0, 1)) for states in (key, value))
    bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    column = cast(Tensor, options.sinks).to(query.dtype).view(1, -1, 1, 1)
    shape = (*query.shape[:3], -1)
    bias = torch.cat([bias.expand(shape), column.expand(shape)], dim=-1)
    return F.scaled_dot_product_attention(
        query, key, value, bias, options.dropout, scale=options.scaling, enable_gqa=True
    )


class RaggedAttention(torch.autograd.Function):
    """Compute attention within each sample with torch's FlashAttention (Dao 2023, FlashAttention-2).

    This calls the two operators that ``torch.nn.attention.varlen.varlen_attn`` wraps. The wrapper costs the host 220 us
    a layer, compared with 40 here (measured with torch 2.15). On compute capability 9.0 and 10.0 it also uses cuDNN,
    which makes a plan for every new batch shape.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: SequenceBounds, options: AttentionOptions
    ) -> Tensor:
        bounds, longest, window, sinks = sequences.cu_seqlens, sequences.longest, options.sliding_window, options.sinks
        ctx.arguments = bounds, bounds, longest, longest, options.dropout, window is None  # for queries and for keys
        window_left = -1 if window is None else window - 1  # -1: no limit
        ctx.options = {"scale": options.scaling, "window_size_left": window_left, "window_size_right": 0}
        attend, debugs = torch.ops.aten._flash_attention_forward.default, False
        attn_out, lse, *ctx.random, _ = attend(query, key, value, *ctx.arguments, debugs, **ctx.options)
        if sinks is not None:  # with these outputs and log-sum-exps, the usual backward is correct
            with_sinks = torch.logaddexp(lse, sinks.float()[:, None])  # (heads, n_tokens)
            attn_out = attn_out * torch.exp(lse - with_sinks).t().unsqueeze(-1).to(attn_out.dtype)
            lse = with_sinks
        ctx.save_for_backward(query, key, value, attn_out, lse)
        return cast(Tensor, attn_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward, saved = torch.ops.aten._flash_attention_backward.default, ctx.saved_tensors
        return *backward(grad.contiguous(), *saved, *ctx.arguments, *ctx.random, **ctx.options), None, None


class EfficientAttention(torch.autograd.Function):
    """Compute attention within each sample with torch's memory-efficient kernels (Rabe and Staats 2021, by xFormers).

    They support any dtype and any head width on compute capability 5.0 or higher, but no grouped heads. Keys and values
    are therefore repeated for each query head. They are not kept, so backward repeats them again. Backward does not
    split its sums over keys, because the parts would be added in any order.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: SequenceBounds, scaling: float | None
    ) -> Tensor:
        bounds, longest = sequences.cu_seqlens, sequences.longest
        ctx.arguments, ctx.scaling = (bounds, bounds, longest, longest), scaling
        states = (each.unsqueeze(0) for each in (query, *_repeat_heads(query, key, value)))
        attend = torch.ops.aten._efficient_attention_forward.default
        attn_out, lse, *ctx.random, _, _ = attend(*states, None, *ctx.arguments, 0.0, _CAUSAL, True, scale=scaling)
        ctx.save_for_backward(query, key, value, attn_out, lse)
        return cast(Tensor, attn_out.squeeze(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attn_out, lse = ctx.saved_tensors
        states = (each.unsqueeze(0) for each in (query, *_repeat_heads(query, key, value)))
        outputs = (attn_out, *ctx.arguments, lse, 0.0, *ctx.random, _CAUSAL, False)
        backward, options = torch.ops.aten._efficient_attention_backward.default, {"num_splits_key": 1}
        grads = backward(grad.contiguous().unsqueeze(0), *states, None, *outputs, scale=ctx.scaling, **options)
        grad_query, *of_heads = (each.squeeze(0) for each in grads[:3])
        grad_key, grad_value = (each.unflatten(1, (key.shape[1], -1)).sum(2) for each in of_heads)
        return grad_query, grad_key, grad_value, None, None


_CAUSAL = 1  # within each sample, a query sees the keys up to its own


def _repeat_heads(query: Tensor, *states: Tensor) -> list[Tensor]:
    """Repeat keys or values ``(tokens, kv_heads, …)`` for each query head, to ``(tokens, heads, …)``."""
    return [each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in states]


class VarlenAttention(torch.autograd.Function):
    """Compute ``softmax(scale · Q Kᵀ + causal) V`` per sample with the C++ loops.

    On a CPU, torch's flash kernel handles one sample at a time, at a fraction of the speed of matrix products. The
    loops save Q, K, V and the log-sum-exp of each row. Backward recomputes the probabilities from these (as in Dao et
    al. 2022, FlashAttention).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: SequenceBounds, scaling: float | None
    ) -> Tensor:
        """Compute attn_out; query is ``(n_tokens, heads, head_dim)``, key and value ``(n_expanded, kv_heads, …)``."""
        query, key, value = (states.contiguous() for states in (query, key, value))
        n_queries, n_keys = len(sequences.expanded.first_expanded), sequences.bounds[-1]
        assert (len(query), len(key)) == (n_queries, n_keys), "samples are of these tokens"  # the loops do not check
        attn_out = torch.empty_like(query)  # (n_tokens, n_heads, head_dim)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)  # (n_tokens, n_heads)
        ctx.scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        sizes = len(sequences.bounds) - 1, query.shape[1], *key.shape[1:]
        ctx.shape_args = sequences.cu_seqlens_q, sequences.cu_seqlens, *sizes
        call("attend", query.dtype, query, key, value, *ctx.shape_args, ctx.scale, attn_out, lse)
        ctx.save_for_backward(query, key, value, lse)
        return attn_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, lse = ctx.saved_tensors
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        inputs = query, key, value, grad.contiguous(), lse
        call("attend_backward", query.dtype, *inputs, *ctx.shape_args, ctx.scale, *grads)
        return *grads, None, None
