"""A decoder layer of few autograd functions, which save little for backward and share their inputs.

It is the layer of LLaMA, Mistral, Qwen2 and Qwen3: linears with or without bias, RMSNorm before attention and MLP (in
Qwen3 also on each head's queries and keys), rotary position embedding, SwiGLU.
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

PIECE_TOKENS = 8192  # tokens that the MLP of a checkpointed layer takes at a time


class RMSNormLinears(torch.autograd.Function):
    """Compute ``y = linear(RMSNorm(x))`` of several linears that share their input.

    It saves x, its inverse root mean squares and the products with A; backward recomputes the normed input. The A of
    all adapters are multiplied as one matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, linears: tuple[LinearParts, ...], *adapters: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute ``(1, n_tokens, out)`` of each linear from x, ``(1, n_tokens, in)``.

        ``adapters`` are the float32 A and B of each linear in turn.
        """
        normed, inverse_rms = rms_norm(x[0], weight, eps)
        all_xa = apply_A(normed, linears)
        ctx.save_for_backward(x[0], weight, inverse_rms, *all_xa, *adapters)
        ctx.linears, ctx.eps = linears, eps
        return tuple(apply_linear(normed, xa, linear)[None] for xa, linear in zip(all_xa, linears, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms, *xa_and_adapters = ctx.saved_tensors
        grads = [grad[0] for grad in grad_outputs]  # (n_tokens, out) each
        grad_xa, grads_B = gradients_of_B(grads, xa_and_adapters[: len(grads)], ctx.linears)
        grads_A: list[Tensor | None] = [None] * len(grads)
        if grad_xa is not None:
            grads_A = gradients_of_A(grad_xa, rms_norm(x, weight, ctx.eps)[0], ctx.linears)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_normed = input_gradient(grads, grad_xa, ctx.linears)
            grad_x = rms_norm_backward(grad_normed, x, weight, inverse_rms)[None]
        return grad_x, None, None, None, *itertools.chain(*zip(grads_A, grads_B, strict=True))


class SwiGLUDown(torch.autograd.Function):
    """Compute ``residual + h Wᵀ + bias + scaling (h Aᵀ) Bᵀ`` of ``h = silu(gate) · up``: the MLP after gate and up.

    It saves gate, up and ``h Aᵀ``; backward recomputes h.
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
        """Compute ``(1, n_tokens, width)``, as of the residual, from gate and up, ``(1, n_tokens, intermediate)``."""
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
    """Normalize each head's queries or keys by RMSNorm with a frozen weight; it saves its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalize ``(…, head_dim)``."""
        rows = x.reshape(-1, x.shape[-1])
        normed, inverse_rms = rms_norm(rows, weight, eps)
        ctx.save_for_backward(rows, weight, inverse_rms)
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, weight, inverse_rms = ctx.saved_tensors
        return rms_norm_backward(grad.reshape(rows.shape), rows, weight, inverse_rms).view(grad.shape), None, None


class FusedDecoderLayer(Fused):
    """A decoder layer of transformers with a fused forward for flat batches."""

    gradient_checkpointing: bool
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of hidden states and all products, if it runs fused."""
        return cast(torch.dtype, self.input_layernorm.weight.dtype)

    def linears(self) -> list[nn.Module]:
        """Return all linears of the layer."""
        attention, mlp = self.self_attn, self.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(1, n_tokens, width)`` to the same; all but flat batches over plain LoRA take transformers' forward."""
        if current_batch.get() is None or args or not self._computes_fused(hidden_states):
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        hidden_states = self._attend(hidden_states, **kwargs)
        if not (self.gradient_checkpointing and hidden_states.shape[1] > PIECE_TOKENS):
            return self._apply_mlp(hidden_states)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        options["context_fn"] = recompute_contexts
        chunks = hidden_states.split(PIECE_TOKENS, dim=1)
        return torch.cat([checkpoint(self._apply_mlp, chunk, **options) for chunk in chunks], dim=1)

    def _computes_fused(self, hidden_states: Tensor) -> bool:
        """Whether a call takes the fused forward; this checks what may change between two passes."""
        if self.plain_reason is not None or torch.is_autocast_enabled(device_of_autocast(hidden_states)):
            return False
        if hidden_states.dtype != self.compute_dtype:
            raise RuntimeError(
                f"Hidden states are {hidden_states.dtype}, in layers of {self.compute_dtype}: cast them."
            )
        lora_layers = [linear for linear in self.linears() if isinstance(linear, LoraLayer)]
        return all(isinstance(layer, FusedLoRA) and layer.computes_fused() for layer in lora_layers)

    def _attend(
        self,
        hidden: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Compute ``hidden + attention(RMSNorm(hidden))``; ``options`` are further arguments of the attention."""
        attention, norm = self.self_attn, self.input_layernorm
        adapters, linears = _adapters_and_parts([attention.q_proj, attention.k_proj, attention.v_proj], hidden.dtype)
        projected = RMSNormLinears.apply(hidden, norm.weight, norm.variance_epsilon, linears, *adapters)
        query, key, value = (states.unflatten(-1, (-1, attention.head_dim)) for states in projected)
        if hasattr(attention, "q_norm"):
            query = HeadNorm.apply(query, attention.q_norm.weight, attention.q_norm.variance_epsilon)
            key = HeadNorm.apply(key, attention.k_norm.weight, attention.k_norm.variance_epsilon)
        # (1, heads, n_tokens, head_dim)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = Rotary.apply(query, key, *position_embeddings)
        config, sliding_window = attention.config, getattr(attention, "sliding_window", None)
        if config.model_type == "mistral":  # its attention has no such attribute; LLaMA ignores the config's
            sliding_window = config.sliding_window
        options |= {"scaling": attention.scaling, "sliding_window": sliding_window}
        attn_out, _ = flat_attention(attention, query, key, value, attention_mask, **options)
        (lora_A, lora_B), (o_proj,) = _adapters_and_parts([attention.o_proj], hidden.dtype)
        attn_out, residual = attn_out.flatten(-2).squeeze(0), hidden.squeeze(0)  # squeeze's backward is a view
        return cast(Tensor, LoRALinearFunction.apply(attn_out, lora_A, lora_B, o_proj, residual)).unsqueeze(0)

    def _apply_mlp(self, hidden: Tensor) -> Tensor:
        """Compute ``hidden + MLP(RMSNorm(hidden))``."""
        norm, mlp = self.post_attention_layernorm, self.mlp
        adapters, linears = _adapters_and_parts([mlp.gate_proj, mlp.up_proj], hidden.dtype)
        gate, up = RMSNormLinears.apply(hidden, norm.weight, norm.variance_epsilon, linears, *adapters)
        (lora_A, lora_B), (down,) = _adapters_and_parts([mlp.down_proj], hidden.dtype)
        return cast(Tensor, SwiGLUDown.apply(gate, up, lora_A, lora_B, down, hidden))


def _adapters_and_parts(
    linears: Sequence[nn.Module], dtype: torch.dtype
) -> tuple[list[Tensor | None], tuple[LinearParts, ...]]:
    """Return A and B of each linear in turn, and the parts of each linear."""
    triples = [linear_parts(linear, dtype) for linear in linears]
    adapters = [matrix for lora_A, lora_B, _ in triples for matrix in (lora_A, lora_B)]
    return adapters, tuple(parts for *_, parts in triples)


def cast_adapters(model: nn.Module) -> dict[Tensor, Tensor]:
    """Cast the adapters of all layers that run fused in one operation: on a GPU each single cast is a launch.

    They train in float32, and a layer has fourteen of them.

    Returns:
        Each A and B in the dtype of the products.
    """
    casts: dict[Tensor, Tensor] = {}
    for layer in model.modules():
        if isinstance(layer, FusedDecoderLayer) and layer.plain_reason is None:
            adapters = itertools.chain(*map(active_lora, layer.linears()))
            params = [param for param in adapters if param is not None]
            casts |= {param: torch.empty_like(param, dtype=layer.compute_dtype) for param in params}
    if casts:
        torch._foreach_copy_(list(casts.values()), [param.detach() for param in casts])
    return casts
