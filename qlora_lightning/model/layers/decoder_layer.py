"""A LLaMA layer in few autograd functions, which save little and share what can be shared."""

import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qlora_lightning.model.layers.attention import flat_attention
from qlora_lightning.model.layers.elementwise import Rotary, normalize, normalize_again, normalize_backward, swiglu
from qlora_lightning.model.layers.lora import (
    Casts,
    Frozen,
    LoRALinearFunction,
    LoRAProjection,
    adapters_of,
    apply,
    device_of_autocast,
    frozen_part,
    gradient_of_a,
    gradients_of_b,
    narrow,
    project,
    project_back,
    runs_fused,
)


class NormedLinears(torch.autograd.Function):
    """Compute ``y = linear(RMSNorm(x))`` of several linears that share their input.

    Kept for backward are x, its inverse root mean squares and the products with A; the normed input is made again. The
    adapters' A act as one matrix. Where x takes no gradient, an output takes one only for the adapter of its linear.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, linears: tuple[Frozen, ...], *adapters: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute.

        Args:
            ctx: Of the function.
            x: ``(…, in)``.
            weight: Of the norm, ``(in,)``.
            eps: Of the norm.
            linears: What of each linear is frozen.
            adapters: A and B of each linear in turn, ``None`` where it has none.

        Returns:
            ``(…, out)`` of each linear.
        """
        flat = x.reshape(-1, x.shape[-1])
        normed, inverse = normalize(flat, weight, eps)
        all_a, all_b = adapters[::2], adapters[1::2]
        there = [a for a in all_a if a is not None]
        lows = narrow(normed, there, linears[0].casts) if there else normed.new_empty(len(normed), 0)
        outputs = [
            project(normed, low, b, frozen) for low, b, frozen in zip(_split(lows, all_a), all_b, linears, strict=True)
        ]
        ctx.save_for_backward(flat, inverse, lows, weight, *adapters)
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
        flat, inverse, lows, weight, *adapters = ctx.saved_tensors
        all_a, all_b, (_, _, _, _, *needed) = adapters[::2], adapters[1::2], ctx.needs_input_grad
        flat_grads: list[Any] = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        of_lows: list[Tensor] = []
        grads_b: list[Tensor | None] = []
        for grad, low, b, b_needs, frozen in zip(
            flat_grads, _split(lows, all_a), all_b, needed[1::2], ctx.linears, strict=True
        ):
            of_low = of_b = None
            if b is not None and grad is not None:
                of_low, of_b = gradients_of_b(grad, low, b, frozen, (True, b_needs))
            of_lows.append(torch.zeros_like(low) if of_low is None else of_low)
            grads_b.append(of_b)
        grad_lows = torch.cat(of_lows, 1)
        grads_a: list[Tensor | None] = [None] * len(all_a)
        if any(needed[::2]):
            normed = normalize_again(flat, weight, inverse)
            pairs = zip(all_a, _split(gradient_of_a(grad_lows, normed), all_a, 0), strict=True)
            grads_a = [None if a is None else grad.to(a.dtype) for a, grad in pairs]
        grad_x = None
        if ctx.needs_input_grad[0]:
            there = [grad is not None for grad in flat_grads]
            of_outputs, linears = (list(itertools.compress(each, there)) for each in (flat_grads, ctx.linears))
            grad_normed = project_back(of_outputs, linears, grad_lows, [a for a in all_a if a is not None])
            grad_x = normalize_backward(grad_normed, flat, weight, inverse).view(ctx.shape)
        of_adapters = [grad for pair in zip(grads_a, grads_b, strict=True) for grad in pair]
        return grad_x, None, None, None, *of_adapters


def _split(stacked: Tensor, all_a: Any, dim: int = 1) -> tuple[Tensor, ...]:
    """Give each linear its part, of no width where it has no adapter."""
    return torch.split(stacked, [0 if a is None else len(a) for a in all_a], dim)


_OF_SAMPLES = ("samples", "kv_cache", "cu_seqlens")  # what attention is told of them


class FusedDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]  # to mypy transformers is untyped
    """transformers' layer with a fused forward for flat batches; parameters and their names stay as they are."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(1, tokens, width)`` to the same; what is not a flat batch over plain linears goes the usual way."""
        if args or not self._fuses(hidden_states, kwargs):
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        attention, mlp = self.self_attn, self.mlp
        linears: tuple[nn.Module, ...] = (attention.q_proj, attention.k_proj, attention.v_proj)
        casts: Casts | None = kwargs.get("casts")
        projected = _apply_norm_and_linears(hidden_states, self.input_layernorm, linears, casts)
        by_heads = (*hidden_states.shape[:2], -1, attention.head_dim)
        query, key, value = (each.view(by_heads).transpose(1, 2) for each in projected)
        query, key = apply(Rotary, query, key, *kwargs["position_embeddings"])
        samples: dict[str, Any] = {name: kwargs.get(name) for name in _OF_SAMPLES}
        mixed, _ = flat_attention(attention, query, key, value, None, scaling=attention.scaling, **samples)
        hidden_states = _apply_linear(mixed.flatten(-2), attention.o_proj, hidden_states, casts)
        linears = (mlp.gate_proj, mlp.up_proj)
        gate, up = _apply_norm_and_linears(hidden_states, self.post_attention_layernorm, linears, casts)
        lora_a, lora_b = adapters_of(mlp.down_proj)
        down = frozen_part(mlp.down_proj, gate.dtype, casts)
        hidden, low = swiglu(gate, up, lora_a, down.casts)
        return cast(Tensor, apply(LoRAProjection, hidden, low, lora_b, down, hidden_states))

    def _fuses(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether this is a flat batch, in the dtype of all products."""
        return (
            runs_fused(self)
            and any(kwargs.get(name) is not None for name in _OF_SAMPLES)
            and hidden_states.dtype == self.__dict__["_dtype"]
            and not torch.is_autocast_enabled(device_of_autocast(hidden_states))
        )


def _apply_norm_and_linears(
    x: Tensor, norm: Any, linears: tuple[nn.Module, ...], casts: Casts | None
) -> tuple[Tensor, ...]:
    frozen = tuple(frozen_part(linear, x.dtype, casts) for linear in linears)
    adapters = [matrix for linear in linears for matrix in adapters_of(linear)]
    return cast(tuple[Tensor, ...], apply(NormedLinears, x, norm.weight, norm.variance_epsilon, frozen, *adapters))


def _apply_linear(x: Tensor, linear: nn.Module, residual: Tensor, casts: Casts | None) -> Tensor:
    frozen = frozen_part(linear, x.dtype, casts)
    return cast(Tensor, apply(LoRALinearFunction, x, *adapters_of(linear), frozen, residual))


def cast_adapters(model: nn.Module, dtype: torch.dtype) -> Casts:
    """Cast the adapters of all layers that run fused at once, as these ask for them."""
    groups: list[list[Tensor]] = []
    for layer in model.modules():
        if isinstance(layer, FusedDecoderLayer) and runs_fused(layer):
            attention, mlp = layer.self_attn, layer.mlp
            apart = [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
            for linears in (*apart, [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]):
                pairs = [adapters_of(linear) for linear in linears]
                groups.append([a for a, _ in pairs if a is not None])
                groups += ([b] for _, b in pairs if b is not None)
    casts = Casts()
    casts.make([group for group in groups if group], dtype)
    return casts
