"""A decoder layer in few autograd functions, which save little and share what can be shared.

It is that of LLaMA, Mistral, Qwen2 and Qwen3: linears with or without bias, RMSNorm before attention and MLP, in Qwen3
also of each head's queries and keys, rotary positions, SwiGLU.
"""
# mypy: allow-untyped-calls

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qlora_lightning.model.layers.attention import current_batch, flat_attention, recompute_contexts
from qlora_lightning.model.layers.elementwise import (
    Rotary,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
)
from qlora_lightning.model.layers.lora import (
    Fused,
    FusedLoRA,
    LinearParts,
    LoRALinearFunction,
    active_lora,
    apply_A,
    apply_linear,
    device_of_autocast,
    gradients_of_A,
    gradients_of_B,
    input_gradient,
    linear_parts,
)

PIECE_TOKENS = 8192  # that the MLP of a checkpointed layer takes at a time


class RMSNormLinears(torch.autograd.Function):
    """Compute ``y = linear(RMSNorm(x))`` of several linears that share their input.

    Kept for backward are x, its inverse root mean squares and the products with A; the normed input is made again. The
    adapters' A act as one matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, linears: tuple[LinearParts, ...], *adapters: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute ``(1, n_tokens, out)`` of each linear from x, ``(1, n_tokens, in)``.

        ``adapters`` are the masters of A and B of each linear in turn.
        """
        normed, inverse_rms = rms_norm(x[0], weight, eps)
        all_xa = apply_A(normed, linears)
        ctx.save_for_backward(x[0], weight, inverse_rms, *all_xa, *adapters)
        ctx.linears, ctx.eps = linears, eps
        return tuple(apply_linear(normed, xa, linear)[None] for xa, linear in zip(all_xa, linears, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms, *rest = ctx.saved_tensors
        grads = [grad[0] for grad in grad_outputs]  # (n_tokens, out) each
        grad_xa, grads_B = gradients_of_B(grads, rest[: len(grads)], ctx.linears)
        grads_A: list[Tensor | None] = [None] * len(grads)
        if grad_xa is not None:
            grads_A = gradients_of_A(grad_xa, rms_norm(x, weight, ctx.eps)[0], ctx.linears)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_normed = input_gradient(grads, grad_xa, ctx.linears)
            grad_x = rms_norm_backward(grad_normed, x, weight, inverse_rms)[None]
        return grad_x, None, None, None, *itertools.chain(*zip(grads_A, grads_B, strict=True))


class SwiGLUDown(torch.autograd.Function):
    """Compute ``residual + h Wᵀ + bias + scaling (h Aᵀ) Bᵀ`` of ``h = silu(gate) · up``: the MLP behind gate and up.

    Kept for backward are gate, up and ``h Aᵀ``; h is made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        down: LinearParts,
        residual: Tensor,
    ) -> Tensor:
        """Compute the residual's shape, ``(1, n_tokens, width)``, from gate and up, ``(1, n_tokens, intermediate)``."""
        hidden = swiglu(gate[0], up[0])
        (xa,) = apply_A(hidden, [down])
        ctx.save_for_backward(gate[0], up[0], xa, lora_A, lora_B)
        ctx.down = down
        return apply_linear(hidden, xa, down, residual[0])[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, xa, _, _ = ctx.saved_tensors
        grad = grad_output[0]  # (n_tokens, width)
        grad_xa, (grad_B,) = gradients_of_B([grad], [xa], [ctx.down])
        grad_hidden = input_gradient([grad], grad_xa, [ctx.down])
        hidden, grad_gate, grad_up = swiglu_backward(gate, up, grad_hidden)
        (grad_A,) = gradients_of_A(grad_xa, hidden, [ctx.down])
        return grad_gate[None], grad_up[None], grad_A, grad_B, None, grad_output


class HeadNorm(torch.autograd.Function):
    """Normalize each head's queries or keys by RMSNorm with a frozen weight; its input is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalize ``(…, head_dim)``."""
        flat = x.reshape(-1, x.shape[-1])
        normed, inverse_rms = rms_norm(flat, weight, eps)
        ctx.save_for_backward(flat, weight, inverse_rms)
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        flat, weight, inverse_rms = ctx.saved_tensors
        return rms_norm_backward(grad.reshape(flat.shape), flat, weight, inverse_rms).view(grad.shape), None, None


class FusedDecoderLayer(Fused):
    """A decoder layer of transformers, whose flat batches take a fused forward."""

    gradient_checkpointing: bool
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of hidden states and all products, where it runs fused."""
        return cast(torch.dtype, self.input_layernorm.weight.dtype)

    def linears(self) -> list[nn.Module]:
        """Return all of its linears."""
        attention, mlp = self.self_attn, self.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(1, n_tokens, width)`` to the same; what is not a flat batch over plain linears goes the usual way."""
        if current_batch.get() is None or args or not self._computes_fused(hidden_states):
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        hidden_states = self._attend(hidden_states, **kwargs)
        if not (self.gradient_checkpointing and hidden_states.shape[1] > PIECE_TOKENS):
            return self._apply_mlp(hidden_states)
        options: dict[str, Any] = {
            "use_reentrant": False,
            "preserve_rng_state": False,
            "context_fn": recompute_contexts,
        }
        pieces = hidden_states.split(PIECE_TOKENS, dim=1)
        return torch.cat([checkpoint(self._apply_mlp, piece, **options) for piece in pieces], dim=1)

    def _computes_fused(self, hidden_states: Tensor) -> bool:
        """Whether a call takes the fused forward: what may change between two passes is looked at here."""
        if self.plain_reason is not None:
            return False
        if torch.is_autocast_enabled(device_of_autocast(hidden_states)):
            return False
        if hidden_states.dtype != self.compute_dtype:
            raise RuntimeError(
                f"Hidden states are {hidden_states.dtype}, in layers of {self.compute_dtype}: cast them."
            )
        adapted = [linear for linear in self.linears() if isinstance(linear, LoraLayer)]
        return all(isinstance(linear, FusedLoRA) and linear.computes_fused() for linear in adapted)

    def _attend(
        self,
        hidden: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Compute ``hidden + attention(RMSNorm(hidden))``; ``options`` are more arguments of the attention."""
        attention, norm = self.self_attn, self.input_layernorm
        adapters, linears = _split([attention.q_proj, attention.k_proj, attention.v_proj], hidden.dtype)
        projected = RMSNormLinears.apply(hidden, norm.weight, norm.variance_epsilon, linears, *adapters)
        query, key, value = (each.unflatten(-1, (-1, attention.head_dim)) for each in projected)
        if hasattr(attention, "q_norm"):
            query = HeadNorm.apply(query, attention.q_norm.weight, attention.q_norm.variance_epsilon)
            key = HeadNorm.apply(key, attention.k_norm.weight, attention.k_norm.variance_epsilon)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))  # (1, heads, n_tokens, head_dim)
        query, key = Rotary.apply(query, key, *position_embeddings)
        config, sliding_window = attention.config, getattr(attention, "sliding_window", None)
        if config.model_type == "mistral":  # whose attention has none of its own; LLaMA's ignores the config's
            sliding_window = config.sliding_window
        options |= {"scaling": attention.scaling, "sliding_window": sliding_window}
        attn_out, _ = flat_attention(attention, query, key, value, attention_mask, **options)
        (lora_A, lora_B), (o_proj,) = _split([attention.o_proj], hidden.dtype)
        attn_out, residual = attn_out.flatten(-2).squeeze(0), hidden.squeeze(0)  # whose backward is a view
        return cast(Tensor, LoRALinearFunction.apply(attn_out, lora_A, lora_B, o_proj, residual)).unsqueeze(0)

    def _apply_mlp(self, hidden: Tensor) -> Tensor:
        """Compute ``hidden + MLP(RMSNorm(hidden))``."""
        norm, mlp = self.post_attention_layernorm, self.mlp
        adapters, linears = _split([mlp.gate_proj, mlp.up_proj], hidden.dtype)
        gate, up = RMSNormLinears.apply(hidden, norm.weight, norm.variance_epsilon, linears, *adapters)
        (lora_A, lora_B), (down,) = _split([mlp.down_proj], hidden.dtype)
        return cast(Tensor, SwiGLUDown.apply(gate, up, lora_A, lora_B, down, hidden))


def _split(linears: Sequence[nn.Module], dtype: torch.dtype) -> tuple[list[Tensor | None], tuple[LinearParts, ...]]:
    """Return A and B of each linear in turn, and what each computes with."""
    parts = [linear_parts(linear, dtype) for linear in linears]
    return [matrix for *adapter, _ in parts for matrix in adapter], tuple(frozen for *_, frozen in parts)


def cast_adapters(model: nn.Module) -> dict[Tensor, Tensor]:
    """Cast the adapters of all layers that run fused in one operation: on a GPU each cast of its own is a launch.

    They train in float32, and a layer has fourteen of them.

    Returns:
        Each A and B in the dtype of the products.
    """
    casts: dict[Tensor, Tensor] = {}
    for layer in model.modules():
        if isinstance(layer, FusedDecoderLayer) and layer.plain_reason is None:
            adapters = itertools.chain(*map(active_lora, layer.linears()))
            casts |= {each: torch.empty_like(each, dtype=layer.compute_dtype) for each in adapters if each is not None}
    if casts:
        torch._foreach_copy_(list(casts.values()), [each.detach() for each in casts])
    return casts
