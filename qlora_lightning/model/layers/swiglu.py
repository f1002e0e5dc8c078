"""SwiGLU, and its product with the A of the LoRA linear behind it."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lightning.model.kernels import loops
from qlora_lightning.model.layers.autograd import apply
from qlora_lightning.model.layers.projection import gradient_of_a, narrow


def swiglu(gate: Tensor, up: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Compute ``h = silu(gate) · up`` (Shazeer 2020, GLU variants) and ``h Aᵀ``.

    Kept for backward are gate and up; h is made again. Where neither takes a gradient, h takes none: A's comes from
    ``h Aᵀ`` alone.

    Args:
        gate: ``(…, wide)``.
        up: Likewise.
        a: ``(rank, wide)``; ``None`` without an adapter.

    Returns:
        ``(tokens, wide)`` and ``(tokens, rank)``.
    """
    gate, up = (each.reshape(-1, each.shape[-1]) for each in (gate, up))
    needed = gate.requires_grad, up.requires_grad
    gate, up = apply(KeptForSwiGLU, gate, up, a)
    return cast(tuple[Tensor, Tensor | None], apply(SwiGLU, gate, up, a, needed))


class KeptForSwiGLU(torch.autograd.Function):
    """Hand gate and up on, and keep them and A for the function behind.

    A function of its own, so that a checkpointed layer that is run again has all that it must keep, and stops, before
    SwiGLU: backward makes h in any case.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gate, up, a)
        ctx.set_materialize_grads(False)
        return gate.view_as(gate), up.view_as(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gate: Tensor | None, grad_up: Tensor | None) -> tuple[Tensor | None, ...]:
        return grad_gate, grad_up, None


class SwiGLU(torch.autograd.Function):
    """Compute h and ``h Aᵀ`` of what :class:`KeptForSwiGLU` keeps."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, a: Tensor | None, needed: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor | None]:
        hidden = _activate(gate, up)
        # torch's compiler knows no way from a function to the one before
        ctx.keeper = gate.grad_fn if any(needed) and not torch.compiler.is_compiling() else None
        ctx.needed = needed
        ctx.set_materialize_grads(False)
        if ctx.keeper is None:
            ctx.save_for_backward(gate, up, a)
        if not any(needed):
            ctx.mark_non_differentiable(hidden)
        return hidden, None if a is None else narrow(hidden, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor | None, grad_low: Tensor | None) -> tuple[Tensor | None, ...]:
        gate, up, a = (ctx.keeper or ctx).saved_tensors
        gate_needs, up_needs = ctx.needed
        a_needs = grad_low is not None and ctx.needs_input_grad[2]
        hidden = grad_gate = grad_up = grad_a = None
        if grad_hidden is not None:
            # Written over below: nothing but LoRAProjection reads h, and the gradient that it gives is its own.
            if grad_low is not None:
                grad_hidden = grad_hidden.addmm_(grad_low, a.to(grad_low.dtype))
            hidden, grad_gate, grad_up = _activate_backward(gate, up, grad_hidden, (a_needs, gate_needs, up_needs))
        elif a_needs:
            hidden = _activate(gate, up)
        if a_needs and grad_low is not None and hidden is not None:
            grad_a = gradient_of_a(grad_low, hidden).to(a.dtype)
        return grad_gate, grad_up, grad_a, None


def _activate(gate: Tensor, up: Tensor) -> Tensor:
    return loops.swiglu(gate, up) if loops.can_run(gate, up) else F.silu(gate).mul_(up)


def _activate_backward(
    gate: Tensor, up: Tensor, grad: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Make h again, and the gradients of gate and up from that of h, which is written over: those that are needed."""
    hidden_is_needed, gate_needs, up_needs = needed
    if gate_needs and up_needs and loops.can_run(gate, up, grad):
        return loops.swiglu_backward(gate, up, grad)
    active = F.silu(gate)
    hidden = active * up if hidden_is_needed else None
    grad_up = active.mul_(grad) if up_needs else None
    if not gate_needs:
        return hidden, None, grad_up
    grad_gate = grad.mul_(up)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return hidden, grad_gate, grad_up
