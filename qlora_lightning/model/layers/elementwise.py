"""RMSNorm, rotary position embedding and SwiGLU, forward and backward, keeping little.

Each is a region: element-wise code. On a CPU the C++ loops run it; on a GPU it is compiled into one kernel; elsewhere
torch runs it operation by operation.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lightning.model.kernels import loops
from qlora_lightning.model.layers.lora import Casts, apply, gradient_of_a, narrow
from qlora_lightning.support.errors import UserError


def run_region(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run element-wise code: on a GPU, where Triton is there, compiled into one kernel for any number of rows."""
    if arguments[0].is_cuda and _has_triton():
        function = _compile(function)
    return function(*arguments)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


# ---- RMSNorm (Zhang and Sennrich 2019) with a frozen weight ---------------------------------------------------------


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Give the norm's output and ``1 / sqrt(mean(x²) + eps)`` of each row, ``(rows, 1)``, at least in float32.

    torch's way rounds before the weight, as transformers does, the loops once.

    Args:
        x: ``(rows, width)``.
        weight: ``(width,)``.
        eps: Of the norm.
    """
    if loops.can_run(x, weight):
        return loops.normalize(x, weight, eps)
    normed, inverse = run_region(_normalize, x, weight, eps)
    return normed, inverse


def normalize_again(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Give the first of what :func:`normalize` gave, bit for bit, from the second."""
    if loops.can_run(x, weight):
        return loops.normalize_again(x, weight, inverse)
    return cast(Tensor, run_region(_normalize_again, x, weight, inverse))


def normalize_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Give the gradient of x from g, that of ``w · x̂`` where ``x̂ = x · inverse``: ``inverse (w g - x̂ mean(w g x̂))``.

    What is given as g may be written over.
    """
    if loops.can_run(grad, x, weight):
        return loops.normalize_backward(grad, x, weight, inverse)
    return cast(Tensor, run_region(_normalize_backward, grad, x, weight, inverse))


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scaled = _precise(x)
    squares: Tensor = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).square_()
    inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return _weigh(scaled.mul_(inverse), weight, x.dtype), inverse


def _normalize_again(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return _weigh(_precise(x).mul_(inverse), weight, x.dtype)


def _normalize_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    scaled = _precise(x).mul_(inverse)
    precise = _precise(grad).mul_(weight.to(scaled.dtype))
    mean = (scaled * precise).mean(-1, keepdim=True)
    return precise.addcmul_(scaled, mean, value=-1).mul_(inverse).to(x.dtype)


def _precise(x: Tensor) -> Tensor:
    """Copy in float32, or better, once: an operation on mixed dtypes would make such a copy each time."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _weigh(scaled: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return scaled.to(dtype, copy=True).mul_(weight)


# ---- rotary position embedding --------------------------------------------------------------------------------------


class Rotary(torch.autograd.Function):
    """Turn each pair ``(x[i], x[i + half])`` by its position's angle (Su et al. 2021, RoFormer).

    As transformers' ``apply_rotary_pos_emb`` lays pairs out. The angles get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Turn both, ``(1, heads, tokens, head_dim)``, by ``cos`` and ``sin`` ``(1, tokens, head_dim)``."""
        ctx.save_for_backward(cos, sin)
        return _turn_both(query, key, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_query: Tensor, of_key: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_turn_both(of_query, of_key, *ctx.saved_tensors, back=True), None, None


def _turn_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    """Turn, or give the gradient of that: the other way, each number by the angle where forward had put it."""
    by_token = [each.transpose(1, 2) for each in (query, key)]
    if len(query) == len(cos) == 1 and loops.can_run(*by_token, cos, sin):
        turned = [loops.rotate(each[0], cos[0], sin[0], back=back)[None].transpose(1, 2) for each in by_token]
        return turned[0], turned[1]
    query, key = run_region(_turn_by_operators, query, key, cos, sin, back)
    return query, key


def _turn_by_operators(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    cos, sin, half = cos[:, None], sin[:, None], query.shape[-1] // 2
    first, second = sin[..., :half], sin[..., half:]
    if back:
        first, second = second, first

    def turn(states: Tensor) -> Tensor:
        turned = states * cos
        turned[..., :half].addcmul_(states[..., half:], first, value=1 if back else -1)
        turned[..., half:].addcmul_(states[..., :half], second, value=-1 if back else 1)
        return turned

    return turn(query), turn(key)


def rope_limit(config: Any) -> int | None:
    """Return how long rows may be before the angles of all rows of a batch depend on its longest one.

    The types ``dynamic`` (NTK) and ``longrope`` scale all angles by the longest row that is beyond the length of the
    base's pre-training. All other types turn a row as if it were alone: ``None``.

    Args:
        config: Of a base, from transformers.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kind = str(rope.get("rope_type"))
    if "dynamic" not in kind and kind != "longrope":  # as transformers' dynamic_rope_update asks
        return None
    most: int = config.max_position_embeddings
    return rope.get("original_max_position_embeddings", most) if kind == "longrope" else most


def check_row_length(config: Any, longest: int) -> None:
    """Refuse rows beyond :func:`rope_limit`: they would be trained otherwise in each batch.

    Args:
        config: Of a base, from transformers.
        longest: Tokens of the longest row.

    Raises:
        UserError: It is too long.
    """
    limit = rope_limit(config)
    if limit is not None and longest > limit:
        raise UserError(
            f"This base scales its rotary embedding ({config.rope_parameters['rope_type']}) by the longest row of a "
            f"batch if that has more than {limit:,} tokens, and rows here may have {longest:,}: the same row would "
            f"be trained differently in each batch. Set data.max_length to {limit} or less."
        )


# ---- SwiGLU ---------------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor, a: Tensor | None, casts: Casts) -> tuple[Tensor, Tensor | None]:
    """Compute ``h = silu(gate) · up`` (Shazeer 2020, GLU variants) and ``h Aᵀ``.

    Kept for backward are gate and up; h is made again. Where neither takes a gradient, h takes none: A's comes from
    ``h Aᵀ`` alone.

    Args:
        gate: ``(…, wide)``.
        up: Likewise.
        a: ``(rank, wide)``; ``None`` without an adapter.
        casts: Of A.

    Returns:
        ``(tokens, wide)`` and ``(tokens, rank)``.
    """
    gate, up = (each.reshape(-1, each.shape[-1]) for each in (gate, up))
    needed = gate.requires_grad, up.requires_grad
    gate, up = apply(KeptForSwiGLU, gate, up, a)
    return cast(tuple[Tensor, Tensor | None], apply(SwiGLU, gate, up, a, needed, casts))


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
        ctx: Any, gate: Tensor, up: Tensor, a: Tensor | None, needed: tuple[bool, bool], casts: Casts
    ) -> tuple[Tensor, Tensor | None]:
        hidden = _activate(gate, up)
        # torch's compiler knows no way from a function to the one before
        ctx.keeper = gate.grad_fn if any(needed) and not torch.compiler.is_compiling() else None
        ctx.needed, ctx.casts = needed, casts
        ctx.set_materialize_grads(False)
        if ctx.keeper is None:
            ctx.save_for_backward(gate, up, a)
        if not any(needed):
            ctx.mark_non_differentiable(hidden)
        return hidden, None if a is None else narrow(hidden, [a], casts)

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
                grad_hidden = grad_hidden.addmm_(grad_low, ctx.casts(grad_low.dtype, a))
            hidden, grad_gate, grad_up = _activate_backward(gate, up, grad_hidden, (a_needs, gate_needs, up_needs))
        elif a_needs:
            hidden = _activate(gate, up)
        if a_needs and grad_low is not None and hidden is not None:
            grad_a = gradient_of_a(grad_low, hidden).to(a.dtype)
        return grad_gate, grad_up, grad_a, None, None


def _activate(gate: Tensor, up: Tensor) -> Tensor:
    if loops.can_run(gate, up):
        return loops.swiglu(gate, up)
    return cast(Tensor, run_region(_activate_by_operators, gate, up))


def _activate_by_operators(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def _activate_backward(
    gate: Tensor, up: Tensor, grad: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Make h again, and the gradients of gate and up from that of h, which is written over: those that are needed."""
    if needed[1] and needed[2] and loops.can_run(gate, up, grad):
        return loops.swiglu_backward(gate, up, grad)
    hidden, of_gate, of_up = run_region(_activate_backward_by_operators, gate, up, grad, *needed)
    return hidden, of_gate, of_up


def _activate_backward_by_operators(
    gate: Tensor, up: Tensor, grad: Tensor, hidden_is_needed: bool, gate_needs: bool, up_needs: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    active = F.silu(gate)
    hidden = active * up if hidden_is_needed else None
    of_up = active.mul_(grad) if up_needs else None
    of_gate = torch.ops.aten.silu_backward(grad.mul_(up), gate) if gate_needs else None
    return hidden, of_gate, of_up
