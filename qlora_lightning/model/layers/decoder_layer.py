"""A decoder layer made of a few autograd functions that save little for backward and share their inputs.

It is the layer of LLaMA, Mistral, Qwen2 and Qwen3. It has linears with or without bias, RMSNorm before attention and
MLP, rotary position embedding, and SwiGLU. Qwen3 also applies RMSNorm to each head's queries and keys.
"""
# mypy: allow-untyped-calls

import itertools
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qlora_lightning.model.layers import attention, elementwise, lora
from qlora_lightning.model.layers.attention import AttentionOptions, PackedPass, current_pass
from qlora_lightning.model.layers.lora import Fused, FusedLoRA, LinearGroup

PIECE_TOKENS = 8192  # tokens that the MLP of a checkpointed layer processes at a time


class RMSNormLinears(torch.autograd.Function):
    """Compute ``y = linear(RMSNorm(x))`` for several linears that share their input, and return x for the residual.

    Forward saves x, its inverse root mean squares and the products with A. Backward recomputes the normed input and
    adds the gradient of the residual. The A matrices of the group are multiplied as one matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Any, group: LinearGroup, head_dim: int | None, *adapters: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return x, then each linear's output, ``(n_tokens, out)`` or ``(n_tokens, heads, head_dim)``."""
        normed, inverse_rms = elementwise.rms_norm(x, norm.weight, norm.variance_epsilon)
        xa = lora.apply_A(normed, group)
        ctx.save_for_backward(x, inverse_rms, xa)
        ctx.norm, ctx.group = norm, group
        outputs = lora.apply_linears(normed, xa, group)
        return x, *(output if head_dim is None else output.view(x.shape[0], -1, head_dim) for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_residual: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse_rms, xa = ctx.saved_tensors
        grads = tuple(grad.flatten(1) for grad in grads)
        grad_xa, grads_B = lora.gradients_of_B(grads, xa, ctx.group)
        grads_A: list[Tensor | None] = [None] * len(grads)
        if grad_xa is not None:
            normed, _ = elementwise.rms_norm(x, ctx.norm.weight, ctx.norm.variance_epsilon)
            grads_A = lora.gradients_of_A(grad_xa, normed, ctx.group)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_normed = lora.input_gradient(grads, grad_xa, ctx.group)
            grad_x = elementwise.rms_norm_backward(grad_normed, x, ctx.norm.weight, inverse_rms, grad_residual)
        return grad_x, None, None, None, *itertools.chain(*zip(grads_A, grads_B, strict=True))


class SwiGLUDown(torch.autograd.Function):
    """Compute ``residual + h Wᵀ + bias + scaling (h Aᵀ) Bᵀ`` for ``h = silu(gate) · up``: the MLP after gate and up.

    Forward saves gate, up and ``h Aᵀ``. Backward recomputes h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        gate: Tensor,
        up: Tensor,
        down: LinearGroup,
        recomputes: bool,
        *adapters: Tensor | None,
    ) -> Tensor:
        """Compute ``(n_tokens, width)``, the residual's shape, from gate and up, ``(n_tokens, intermediate)``.

        ``recomputes`` skips the product with W, a quarter of a layer's products. Only the saved tensors are then read.
        """
        hidden = elementwise.swiglu(gate, up)
        xa = lora.apply_A(hidden, down)
        ctx.save_for_backward(gate, up, xa)
        ctx.down = down
        return residual if recomputes else lora.apply_linear(hidden, xa, down.linears[0], residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, xa = ctx.saved_tensors
        grad_xa, (grad_B,) = lora.gradients_of_B([grad], xa, ctx.down)
        grad_hidden = lora.input_gradient([grad], grad_xa, ctx.down)
        hidden, grad_gate, grad_up = elementwise.swiglu_backward(gate, up, grad_hidden)
        (grad_A,) = lora.gradients_of_A(grad_xa, hidden, ctx.down)
        return grad, grad_gate, grad_up, None, None, grad_A, grad_B


class RMSNorm(torch.autograd.Function):
    """Normalize each head's queries or keys, or the last hidden states, by RMSNorm with a frozen weight.

    Forward saves its input and the inverse root mean squares.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any) -> Tensor:
        """Normalize ``(…, width)``."""
        rows = x.reshape(-1, x.shape[-1])
        normed, inverse_rms = elementwise.rms_norm(rows, norm.weight, norm.variance_epsilon)
        ctx.save_for_backward(rows, inverse_rms)
        ctx.norm = norm
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, inverse_rms = ctx.saved_tensors
        grad_x = elementwise.rms_norm_backward(grad.reshape(rows.shape), rows, ctx.norm.weight, inverse_rms)
        return grad_x.view(grad.shape), None


class FusedNorm(Fused):
    """The last norm of a transformers model, as one GPU launch in packed batches; theirs makes float32 states."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize ``(…, width)``."""
        is_plain = current_pass.get() is None or self.fallback_reason is not None
        if is_plain or not hidden_states.is_cuda or hidden_states.dtype != self.weight.dtype:
            return cast(Tensor, super().forward(hidden_states))
        return cast(Tensor, RMSNorm.apply(hidden_states, self))


class LayerGroups(NamedTuple):
    """A layer's linears grouped by input, collected once per pass to save time on the host.

    Attributes:
        qkv: The linears after the first norm.
        o: The linear after attention.
        gate_up: The linears after the second norm.
        down: The linear after SwiGLU.
    """

    qkv: LinearGroup
    o: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup


class FusedDecoderLayer(Fused):
    """A decoder layer of transformers with a fused forward for packed batches."""

    gradient_checkpointing: bool
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of hidden states and all products when the layer runs fused."""
        return cast(torch.dtype, self.input_layernorm.weight.dtype)

    def linears(self) -> list[nn.Module]:
        """Return all linears of the layer."""
        attn, mlp = self.self_attn, self.mlp
        projections = [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj]
        return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]

    def computes_fused(self) -> bool:
        """Whether the fused forward gives the layer's current output."""
        lora_layers = [linear for linear in self.linears() if isinstance(linear, LoraLayer)]
        is_plain = all(isinstance(layer, FusedLoRA) and layer.computes_fused() for layer in lora_layers)
        return self.fallback_reason is None and is_plain

    def groups(self, copies: list[tuple[Tensor, Tensor]]) -> LayerGroups:
        """Return the groups of linears; for ``copies`` see :func:`~qlora_lightning.model.layers.lora.linear_group`."""
        linears = self.linears()
        groups = linears[:3], linears[3:4], linears[4:6], linears[6:]
        return LayerGroups(*(lora.linear_group(group, self.compute_dtype, copies) for group in groups))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(1, n_tokens, width)`` to the same shape; if not packed or not plain LoRA, by transformers' forward."""
        batch = current_pass.get()
        groups = None if batch is None or args else batch.layers.get(self)
        if batch is None or groups is None:
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        # transformers 5.17 also runs a layer's hooks when it recomputes, and they may read the layer's output
        if batch.recomputes and self._forward_hooks:
            with attention.packed_pass(batch._replace(recomputes=False)):
                return FusedDecoderLayer.forward(self, hidden_states, **kwargs)
        hidden = self._attend(hidden_states.squeeze(0), groups, batch, **kwargs)
        if self.gradient_checkpointing and len(hidden) > PIECE_TOKENS:
            return self._apply_mlp_in_pieces(hidden, groups).unsqueeze(0)
        return self._apply_mlp(hidden, groups).unsqueeze(0)

    def _attend(
        self,
        hidden: Tensor,
        groups: LayerGroups,
        batch: PackedPass,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute ``hidden + attention(RMSNorm(hidden))``, ``(n_tokens, width)``; no mask is needed."""
        attention.reject_unsupported(type(self), kwargs)
        attn, qkv, o = self.self_attn, groups.qkv, groups.o
        inputs = hidden, self.input_layernorm, qkv, attn.head_dim
        residual, query, key, value = RMSNormLinears.apply(*inputs, *qkv.adapters)
        if hasattr(attn, "q_norm"):
            query, key = RMSNorm.apply(query, attn.q_norm), RMSNorm.apply(key, attn.k_norm)
        query, key = elementwise.Rotary.apply(query, key, *position_embeddings)
        # LLaMA ignores the config's sliding window; Mistral's attention has no attribute of it
        owner = attn.config if attn.config.model_type == "mistral" else attn
        options = AttentionOptions(attn.scaling, sliding_window=getattr(owner, "sliding_window", None))
        attn_out = attention.attend(query, key, value, batch, options).flatten(1)
        return cast(Tensor, lora.LoRALinearFunction.apply(attn_out, o, residual, *o.adapters))

    def _apply_mlp(self, hidden: Tensor, groups: LayerGroups) -> Tensor:
        """Compute ``hidden + MLP(RMSNorm(hidden))``, ``(n_tokens, width)``."""
        gate_up, down = groups.gate_up, groups.down
        states = RMSNormLinears.apply(hidden, self.post_attention_layernorm, gate_up, None, *gate_up.adapters)
        recomputes = cast(PackedPass, current_pass.get()).recomputes
        return cast(Tensor, SwiGLUDown.apply(*states, down, recomputes, *down.adapters))

    def _apply_mlp_in_pieces(self, hidden: Tensor, groups: LayerGroups) -> Tensor:
        """Compute the same as :meth:`_apply_mlp`, in checkpointed pieces of ``PIECE_TOKENS`` tokens.

        When backward recomputes the layer, only the inputs of the pieces are read, because each piece is recomputed
        separately.
        """
        recomputes = cast(PackedPass, current_pass.get()).recomputes
        function = (lambda piece, groups: piece) if recomputes else self._apply_mlp
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        options["context_fn"] = attention.recompute_contexts
        pieces = [checkpoint(function, piece, groups, **options) for piece in hidden.split(PIECE_TOKENS)]
        return torch.cat(pieces)


def prepare_layers(causal_lm: Any) -> dict[nn.Module, LayerGroups]:
    """Return the linears of all layers that currently run fused, and cast all adapters in one operation.

    The result is valid for one pass. On a GPU, each separate cast is a launch, and a layer has fourteen.
    """
    layers = [layer for layer in getattr(causal_lm.base_model, "layers", ()) if isinstance(layer, FusedDecoderLayer)]
    copies: list[tuple[Tensor, Tensor]] = []
    groups: dict[nn.Module, LayerGroups] = {layer: layer.groups(copies) for layer in layers if layer.computes_fused()}
    lora.copy_all(copies)
    return groups
