"""A decoder layer in few autograd functions, which save little and share what can be shared.

It is that of LLaMA, Mistral, Qwen2 and Qwen3: linears with or without bias, RMSNorm before attention and MLP, in Qwen3
also of each head's queries and keys, rotary positions, SwiGLU.
"""
# mypy: allow-untyped-calls

import functools
import itertools
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_lightning.model.layers.attention import flat_attention
from qlora_lightning.model.layers.elementwise import (
    Rotary,
    rms_norm,
    rms_norm_again,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
)
from qlora_lightning.model.layers.lora import (
    TILE_TOKENS,
    FrozenLinear,
    LoRALinearFunction,
    adapters_of,
    device_of_autocast,
    frozen_linear,
    gradient_of_a,
    gradient_of_input,
    gradients_of_b,
    lora_down,
    project,
    runs_fused,
)


class NormedLinears(torch.autograd.Function):
    """Compute ``y = linear(RMSNorm(x))`` of several linears that share their input.

    Kept for backward are x, its inverse root mean squares and the products with A; the normed input is made again. The
    adapters' A act as one matrix. Where x takes no gradient, an output takes one only for the adapter of its linear.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, linears: tuple[FrozenLinear, ...], *adapters: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute ``(…, out)`` of each linear from x, ``(…, in)``.

        ``adapters`` are A and B of each linear in turn, ``None`` if it has none.
        """
        flat = x.reshape(-1, x.shape[-1])
        normed, inverse = rms_norm(flat, weight, eps)
        all_a, all_b = adapters[::2], adapters[1::2]
        there = [a for a in all_a if a is not None]
        xa = lora_down(normed, there, linears) if there else normed.new_empty(len(normed), 0)
        outputs = [project(normed, *each) for each in zip(_split(xa, all_a), all_b, linears, strict=True)]
        ctx.save_for_backward(flat, inverse, xa, weight, *adapters)
        ctx.linears, ctx.shape = linears, x.shape
        ctx.set_materialize_grads(False)
        shaped = tuple(output.view(*x.shape[:-1], -1) for output in outputs)
        needs_x, _, _, _, *needed = ctx.needs_input_grad
        if not needs_x:
            pairs = zip(shaped, needed[::2], needed[1::2], strict=True)
            ctx.mark_non_differentiable(*(output for output, of_a, of_b in pairs if not (of_a or of_b)))
        return shaped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        flat, inverse, xa, weight, *adapters = ctx.saved_tensors
        all_a, all_b, (needs_x, _, _, _, *needed) = adapters[::2], adapters[1::2], ctx.needs_input_grad
        of_outputs: list[Any] = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grads_xa: list[Tensor] = []
        grads_a: list[Tensor | None] = [None] * len(all_a)
        grads_b: list[Tensor | None] = []
        of_linears = of_outputs, _split(xa, all_a), all_b, ctx.linears, needed[1::2]
        for grad, own_xa, b, linear, b_needs in zip(*of_linears, strict=True):
            grad_xa = grad_b = None
            if b is not None and grad is not None:
                grad_xa, grad_b = gradients_of_b(grad, own_xa, b, linear, (True, b_needs))
            grads_xa.append(torch.zeros_like(own_xa) if grad_xa is None else grad_xa)
            grads_b.append(grad_b)
        grad_xa = torch.cat(grads_xa, 1)
        if any(needed[::2]):
            normed = rms_norm_again(flat, weight, inverse)
            pairs = zip(all_a, _split(gradient_of_a(grad_xa, normed), all_a, 0), strict=True)
            grads_a = [None if a is None else grad.to(a.dtype) for a, grad in pairs]
        grad_x = None
        if needs_x:
            there = [grad is not None for grad in of_outputs]
            with_grad, linears = (list(itertools.compress(each, there)) for each in (of_outputs, ctx.linears))
            grad_normed = gradient_of_input(with_grad, linears, grad_xa, [a for a in all_a if a is not None])
            grad_x = rms_norm_backward(grad_normed, flat, weight, inverse).view(ctx.shape)
        return grad_x, None, None, None, *itertools.chain(*zip(grads_a, grads_b, strict=True))


def _split(stacked: Tensor, all_a: Any, dim: int = 1) -> tuple[Tensor, ...]:
    """Return the part of each linear, of no width if it has no adapter."""
    return torch.split(stacked, [0 if a is None else len(a) for a in all_a], dim)


class NormedQKV(NormedLinears):
    """Those of attention: a profile tells forward and backward of the two by their names."""


class NormedGateUp(NormedLinears):
    """Those of the MLP."""


class Kept(torch.autograd.Function):
    """Hand the first tensors on, and keep all for backward of the function behind, which takes them from here.

    A function of its own, so that a checkpointed layer that is run again has all that it must keep, and stops, before
    the products of the function behind: backward makes what it needs of these in any case.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.others = len(tensors) - count
        return tuple(each.view_as(each) for each in tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads, *[None] * ctx.others


class SwiGLUProjection(torch.autograd.Function):
    """Compute ``residual + h Wᵀ + bias + scaling (h Aᵀ) Bᵀ`` of ``h = silu(gate) · up``: the last of a decoder layer.

    It saves nothing through autograd; ``h Aᵀ``, a few columns, is kept by hand, all else by :class:`Kept`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        down: FrozenLinear,
        residual: Tensor,
        needed: tuple[bool, bool],
        again: bool,
    ) -> Tensor:
        """Compute the shape of the residual, ``(…, out)``, from gate and up, ``(tokens, wide)``.

        ``needed``: which of these take a gradient. What Kept hands on always does if an adapter trains. ``again``: only
        backward is wanted, and no numbers.
        """
        hidden = swiglu(gate, up)
        xa = None if lora_a is None else lora_down(hidden, [lora_a], [down])
        ctx.kept, ctx.xa, ctx.down, ctx.needed = gate.grad_fn, xa, down, needed
        return residual.view_as(residual) if again else project(hidden, xa, lora_b, down, residual).view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, lora_a, lora_b = ctx.kept.saved_tensors
        needs_hidden, (_, _, needs_a, needs_b, _, needs_residual, _, _) = any(ctx.needed), ctx.needs_input_grad
        of_output = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        hidden = grad_xa = grad_gate = grad_up = grad_a = grad_b = None
        if lora_b is not None:
            needed = needs_hidden or needs_a, needs_b
            grad_xa, grad_b = gradients_of_b(of_output, ctx.xa, lora_b, ctx.down, needed)
        if needs_hidden:
            grad_hidden = gradient_of_input([of_output], [ctx.down], grad_xa, [] if lora_a is None else [lora_a])
            hidden, grad_gate, grad_up = swiglu_backward(gate, up, grad_hidden, needs_a, *ctx.needed)
        elif needs_a:
            hidden = swiglu(gate, up)
        if needs_a and hidden is not None and grad_xa is not None:
            grad_a = gradient_of_a(grad_xa, hidden).to(lora_a.dtype)
        return grad_gate, grad_up, grad_a, grad_b, None, grad if needs_residual else None, None, None


def run_mlp(
    x: Tensor,
    weight: Tensor,
    eps: float,
    linears: tuple[FrozenLinear, ...],
    *adapters: Tensor | None,
    again: bool = False,
) -> Tensor:
    """Compute ``x + MLP(RMSNorm(x))``, ``(1, tokens, width)``, by the linears gate, up and down.

    ``adapters``: A and B of each. ``again``: only backward is wanted, and no numbers.
    """
    *of_inputs, lora_a, lora_b = adapters
    projected = NormedGateUp.apply(x, weight, eps, linears[:2], *of_inputs)
    gate, up = (each.flatten(0, 1) for each in projected)
    needed = gate.requires_grad, up.requires_grad
    gate, up = Kept.apply(2, gate, up, lora_a, lora_b)
    output: Tensor = SwiGLUProjection.apply(gate, up, lora_a, lora_b, linears[2], x, needed, again)
    return output


class MLPByTiles(torch.autograd.Function):
    """Compute :func:`run_mlp` of so many tokens at a time, forward and backward (Bekman et al. 2025, ALST).

    What is as wide as the MLP, five times in backward, exists for one tile. It saves nothing but what :class:`Kept`
    does; backward computes gate and up again. In a checkpointed layer that takes no more products, as the layer stops
    before them when it is run again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, needs_x: bool, frozen: tuple[Any, ...], *adapters: Tensor | None) -> Tensor:
        """Compute ``(1, tokens, width)``; ``frozen`` are the arguments of run_mlp between x and the adapters."""
        ctx.kept, ctx.needs_x, ctx.frozen = x.grad_fn, needs_x, frozen
        output = torch.empty_like(x)
        for rows, part in zip(_tiles(x), _tiles(output), strict=True):
            part.copy_(run_mlp(rows, *frozen, *adapters))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *adapters = ctx.kept.saved_tensors
        pairs = zip(adapters, ctx.needs_input_grad[3:], strict=True)
        leaves = [None if each is None else each.detach().requires_grad_(needed) for each, needed in pairs]
        grad_x = torch.empty_like(x)
        for rows, of_rows, part in zip(_tiles(x), _tiles(grad), _tiles(grad_x), strict=True):
            rows = rows.detach().requires_grad_(ctx.needs_x)
            with torch.enable_grad():
                output = run_mlp(rows, *ctx.frozen, *leaves, again=True)
            output.backward(of_rows)  # which adds up the leaves' gradients
            if rows.grad is not None:
                part.copy_(rows.grad)
        return grad_x if ctx.needs_x else None, None, None, *(each if each is None else each.grad for each in leaves)


def _tiles(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, TILE_TOKENS, 1)


class HeadNorm(torch.autograd.Function):
    """Normalize each head's queries or keys by RMSNorm with a frozen weight; its input is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalize ``(…, head_dim)``."""
        flat = x.reshape(-1, x.shape[-1])
        normed, inverse = rms_norm(flat, weight, eps)
        ctx.save_for_backward(flat, weight, inverse)
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        flat, weight, inverse = ctx.saved_tensors
        of_rows = grad.reshape(flat.shape).clone()  # which is written over
        return rms_norm_backward(of_rows, flat, weight, inverse).view(grad.shape), None, None


class FusedDecoderLayer(nn.Module):
    """A fused forward for flat batches, put before that of transformers' layer: see :func:`fused_class`.

    Attributes:
        parts: Types of its attention, MLP and norms, whose work the fused forward does.
    """

    parts: tuple[type[nn.Module], ...]
    gradient_checkpointing: bool
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(1, tokens, width)`` to the same; what is not a flat batch over plain linears goes the usual way."""
        samples: dict[str, Any] = {name: kwargs.get(name) for name in ("samples", "cu_seqlens")}
        is_flat = any(each is not None for each in samples.values())
        dtype = None if torch.is_autocast_enabled(device_of_autocast(hidden_states)) else hidden_states.dtype
        if args or not (is_flat and runs_fused(self) and dtype == self.__dict__["_dtype"]):  # that of all products
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        attention, mlp, casts = self.self_attn, self.mlp, kwargs.get("casts")
        linears: tuple[nn.Module, ...] = (attention.q_proj, attention.k_proj, attention.v_proj)
        adapters, frozen = _parts_of(self.input_layernorm, linears, hidden_states.dtype, casts)
        projected = NormedQKV.apply(hidden_states, *frozen, *adapters)
        by_heads = (*hidden_states.shape[:2], -1, attention.head_dim)
        query, key, value = (each.view(by_heads) for each in projected)
        if hasattr(attention, "q_norm"):
            query, key = (
                HeadNorm.apply(each, norm.weight, norm.variance_epsilon)
                for each, norm in ((query, attention.q_norm), (key, attention.k_norm))
            )
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        query, key = Rotary.apply(query, key, *kwargs["position_embeddings"])
        samples["sliding_window"] = window_of(attention)
        mixed, _ = flat_attention(attention, query, key, value, None, scaling=attention.scaling, **samples)
        out = frozen_linear(attention.o_proj, mixed.dtype, casts)
        hidden_states = LoRALinearFunction.apply(mixed.flatten(-2), *adapters_of(attention.o_proj), out, hidden_states)
        norm, linears = self.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        adapters, frozen = _parts_of(norm, linears, hidden_states.dtype, casts)
        if not (self.gradient_checkpointing and hidden_states.shape[1] > TILE_TOKENS):
            return run_mlp(hidden_states, *frozen, *adapters)
        (x,) = Kept.apply(1, hidden_states, *adapters)
        return cast(Tensor, MLPByTiles.apply(x, hidden_states.requires_grad, frozen, *adapters))


@functools.cache
def fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Make the fused class of a decoder layer of transformers; parameters and their names stay as they are."""
    modeling, family = sys.modules[kind.__module__], kind.__name__.removesuffix("DecoderLayer")
    attention, mlp, norm = (getattr(modeling, f"{family}{part}") for part in ("Attention", "MLP", "RMSNorm"))
    body = {"parts": (attention, mlp, norm), "__module__": __name__}
    return type(f"Fused{kind.__name__}", (FusedDecoderLayer, kind), body)


def window_of(attention: Any) -> int | None:
    """Return how many tokens an attention sees, as its own forward: Mistral's asks the config."""
    config = getattr(attention, "config", None)
    window: int | None = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return window


def _parts_of(
    norm: Any, linears: tuple[nn.Module, ...], dtype: torch.dtype, casts: Mapping[Tensor, Tensor] | None
) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """Return A and B of each linear, and what does not train of it and of the norm before."""
    frozen = tuple(frozen_linear(linear, dtype, casts) for linear in linears)
    adapters = [matrix for linear in linears for matrix in adapters_of(linear)]
    return adapters, (norm.weight, norm.variance_epsilon, frozen)


def cast_adapters(model: nn.Module) -> dict[Tensor, Tensor]:
    """Cast the adapters of all layers that run fused in one operation: on a GPU each cast of its own is a launch.

    They train in float32, and a layer has fourteen of them.

    Returns:
        For each A those of the linears that share its input, stacked, and each B; the model takes it as ``casts``.
    """
    casts: dict[Tensor, Tensor] = {}
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for layer in model.modules():
        if not (isinstance(layer, FusedDecoderLayer) and runs_fused(layer)):
            continue
        attention, mlp = layer.self_attn, layer.mlp
        of_attention = [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]
        for linears in (*of_attention, [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]):
            pairs = [(a, b) for a, b in map(adapters_of, linears) if a is not None and b is not None]
            for group in ([a for a, _ in pairs], *([b] for _, b in pairs)):
                rows = [len(each) for each in group]
                if rows:
                    stacked = group[0].new_empty(sum(rows), group[0].shape[1], dtype=layer.__dict__["_dtype"])
                    targets += torch.split(stacked, rows)
                    sources += (each.detach() for each in group)
                    casts.update(dict.fromkeys(group, stacked))
    if targets:
        torch._foreach_copy_(targets, sources)
    return casts
