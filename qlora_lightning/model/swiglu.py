"""SwiGLU, and its product with the A of the LoRA linear behind it, as one autograd function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class SwiGLU(torch.autograd.Function):
    """Compute ``h = silu(gate) · up`` (Shazeer 2020, GLU variants) and ``h Aᵀ``.

    Kept for backward are gate and up; h is made again.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Map gate and up, ``(…, wide)``, and A, ``(rank, wide)``, to ``(tokens, wide)`` and ``(tokens, rank)``."""
        flat_gate, flat_up = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        hidden = F.silu(flat_gate).mul_(flat_up)
        ctx.save_for_backward(flat_gate, flat_up, a)
        ctx.shape = gate.shape
        return hidden, None if a is None else hidden @ a.to(hidden.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, grad_low: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, a = ctx.saved_tensors
        active, grad_a = F.silu(gate), None
        # Written over below: nothing but LoRAProjection reads h, and the gradient that it gives is its own.
        if a is not None and grad_low is not None:
            grad_a = (grad_low.t() @ (active * up)).to(a.dtype)
            grad_hidden = grad_hidden.addmm_(grad_low, a.to(grad_low.dtype))
        grad_up = active.mul_(grad_hidden)
        grad_gate = grad_hidden.mul_(up)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate.view(ctx.shape), grad_up.view(ctx.shape), grad_a
