"""SwiGLU, and its product with the A of the LoRA linear behind it, as one autograd function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class SwiGLU(torch.autograd.Function):
    """Compute ``h = silu(gate) · up`` (Shazeer 2020, GLU variants) and ``h Aᵀ``.

    Kept for backward are gate and up; h is made again. Where neither takes a gradient, h takes none: A's comes from
    ``h Aᵀ`` alone.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Map gate and up, ``(…, wide)``, and A, ``(rank, wide)``, to ``(tokens, wide)`` and ``(tokens, rank)``."""
        flat_gate, flat_up = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        hidden = F.silu(flat_gate).mul_(flat_up)
        ctx.save_for_backward(flat_gate, flat_up, a)
        ctx.shape = gate.shape
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(hidden)
        return hidden, None if a is None else hidden @ a.to(hidden.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor | None, grad_low: Tensor | None) -> tuple[Tensor | None, ...]:
        gate, up, a = ctx.saved_tensors
        gate_needs, up_needs, a_needs = ctx.needs_input_grad
        active = F.silu(gate)
        grad_a = (grad_low.t() @ (active * up)).to(a.dtype) if a_needs and grad_low is not None else None
        if grad_hidden is None:
            return None, None, grad_a
        # Written over below: nothing but LoRAProjection reads h, and the gradient that it gives is its own.
        if grad_low is not None:
            grad_hidden = grad_hidden.addmm_(grad_low, a.to(grad_low.dtype))
        grad_up = active.mul_(grad_hidden).view(ctx.shape) if up_needs else None
        if not gate_needs:
            return None, grad_up, grad_a
        grad_gate = grad_hidden.mul_(up)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate.view(ctx.shape), grad_up, grad_a
