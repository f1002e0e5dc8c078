"""SwiGLU and the LoRA linear behind it as one autograd function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lightning.model.linear import Frozen, gradient_of_b, gradient_of_low, project


class SwiGLUDown(torch.autograd.Function):
    """Compute ``residual + down(silu(gate) · up)`` (Shazeer 2020, GLU variants).

    Kept for backward are gate, up and the product with A; the product of gate and up is made again.
    """

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, residual: Tensor, frozen: Frozen, a: Tensor | None, b: Tensor | None
    ) -> Tensor:
        """Map gate and up ``(…, wide)`` to ``(…, width)``, the shape of ``residual``."""
        flat_gate, flat_up = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        hidden = F.silu(flat_gate).mul_(flat_up)
        low = None if a is None else hidden @ a.to(hidden.dtype).t()
        output = project(hidden, low, b, frozen, residual)
        ctx.save_for_backward(flat_gate, flat_up, low, a, b)
        ctx.frozen, ctx.shape = frozen, gate.shape
        return output.view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, low, a, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        active, grad_a, grad_b = F.silu(gate), None, None
        if a is not None:
            grad_low = gradient_of_low(flat, b, ctx.frozen)
            grad_a = (grad_low.t() @ (active * up)).to(a.dtype)
            grad_b = gradient_of_b(flat, low, b, ctx.frozen)
        grad_hidden = ctx.frozen.weight.multiply_back(flat)  # (tokens, wide)
        if a is not None:
            grad_hidden.addmm_(grad_low, a.to(flat.dtype))
        grad_up = active.mul_(grad_hidden)
        grad_gate = grad_hidden.mul_(up)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate.view(ctx.shape), grad_up.view(ctx.shape), grad, None, grad_a, grad_b
