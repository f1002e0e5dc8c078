"""SwiGLU, and its product with the A of the LoRA linear behind it."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lightning.model.autograd import apply


def swiglu(gate: Tensor, up: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Compute ``h = silu(gate) · up`` (Shazeer 2020, GLU variants) and ``h Aᵀ``.

    Kept for backward are gate and up; h is made again.

    Args:
        gate: ``(…, wide)``.
        up: Likewise.
        a: ``(rank, wide)``; ``None`` without an adapter.

    Returns:
        ``(tokens, wide)`` and ``(tokens, rank)``.
    """
    gate, up = (each.reshape(-1, each.shape[-1]) for each in (gate, up))
    return cast(tuple[Tensor, Tensor | None], apply(SwiGLU, *apply(KeptForSwiGLU, gate, up), a))


class KeptForSwiGLU(torch.autograd.Function):
    """Hand gate and up on, and keep them for the function behind.

    A function of its own, so that a checkpointed layer that is run again has all that it must keep, and stops, before
    SwiGLU: backward makes h in any case.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gate, up)
        return gate.view_as(gate), up.view_as(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gate: Tensor, grad_up: Tensor) -> tuple[Tensor, Tensor]:
        return grad_gate, grad_up


class SwiGLU(torch.autograd.Function):
    """Compute h and ``h Aᵀ`` of what :class:`KeptForSwiGLU` keeps."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor | None]:
        hidden = F.silu(gate).mul_(up)
        ctx.keeper, ctx.a = gate.grad_fn, a
        if ctx.keeper is None:  # neither gate nor up takes a gradient, and nothing was kept
            ctx.save_for_backward(gate, up)
        return hidden, None if a is None else hidden @ a.to(hidden.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, grad_low: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up = (ctx.keeper or ctx).saved_tensors
        active, grad_a = F.silu(gate), None
        # Written over below: nothing but LoRAProjection reads h, and the gradient that it gives is its own.
        if ctx.a is not None and grad_low is not None:
            grad_a = (grad_low.t() @ (active * up)).to(ctx.a.dtype)
            grad_hidden = grad_hidden.addmm_(grad_low, ctx.a.to(grad_low.dtype))
        grad_up = active.mul_(grad_hidden)
        grad_gate = grad_hidden.mul_(up)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up, grad_a
