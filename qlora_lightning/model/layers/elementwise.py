"""RMSNorm, rotary position embedding and SwiGLU, forward and backward, keeping little.

Each is a region: element-wise code, which a GPU runs as one compiled kernel. A CPU runs it operation by operation, but
for SwiGLU, whose exponentials cost most, it has a kernel of ours.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lightning.model.cpu.library import call, has_function, is_here

_log = logging.getLogger(__name__)
_Operations = TypeVar("_Operations", bound=Callable[..., Any])
# Which dimension is the tokens', by how many a tensor has: (tokens, width), (1, tokens, …), (1, heads, tokens, …)
_TOKENS = {2: 0, 3: 1, 4: 2}


def _region(operations: _Operations) -> _Operations:
    @functools.wraps(operations)
    def run(*arguments: Any) -> Any:
        return run_region(operations, *arguments)

    return cast(_Operations, run)


def run_region(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run element-wise code: on a GPU, if Triton can, compiled into one kernel for any number of rows."""
    if arguments[0].is_cuda and has_triton():
        mark_tokens(arguments)
        function = compile_region(function)
    return function(*arguments)


@functools.cache
def compile_region(function: Callable[..., Any], backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """Compile a region for any number of tokens, and for each width again: a kernel is quicker if it knows that."""
    return torch.compile(function, dynamic=False, backend=backend)


def mark_tokens(arguments: Iterable[Any]) -> None:
    """Tell the compiler which dimension of each tensor is the tokens'; see :data:`_TOKENS`."""
    for each in arguments:
        if isinstance(each, Tensor) and each.dim() in _TOKENS:
            torch._dynamo.maybe_mark_dynamic(each, _TOKENS[each.dim()])


@functools.cache
def has_triton() -> bool:
    """Whether Triton makes a kernel here: it takes a C compiler, Python's headers and a card that is not too old."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device="cuda"))
    except Exception as error:  # of Triton, of its compiler or of torch's
        reason = str(error).strip().partition("\n")[0]
        _log.warning("Triton compiles nothing here (%s): norm, rotary and SwiGLU take several kernels each.", reason)
        return False
    return True


# ---- RMSNorm (Zhang and Sennrich 2019) with a frozen weight ---------------------------------------------------------


@_region
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the norm's output and ``1 / sqrt(mean(x²) + eps)`` of each row, ``(rows, 1)``, at least in float32.

    It rounds before the weight, as transformers does.
    """
    scaled = _to_float32(x)
    squares: Tensor = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).square_()
    inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return scaled.mul_(inverse).to(x.dtype, copy=True).mul_(weight), inverse


@_region
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Compute the gradient of x, ``inverse (w g - x̂ mean(w g x̂))`` where ``x̂ = x · inverse``, from the output's."""
    scaled = _to_float32(x).mul_(inverse)
    precise = _to_float32(grad).mul_(weight.to(scaled.dtype))
    mean = (scaled * precise).mean(-1, keepdim=True)
    return precise.addcmul_(scaled, mean, value=-1).mul_(inverse).to(x.dtype)


def _to_float32(x: Tensor) -> Tensor:
    """Copy in float32, or better, once: an operation on mixed dtypes would make such a copy each time."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


# ---- SwiGLU (Shazeer 2020, GLU variants) ----------------------------------------------------------------------------


@_region
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute ``h = silu(gate) · up``."""
    if _has_cpu_kernel(gate, up):
        hidden = torch.empty_like(gate)
        call("swiglu", gate.dtype, gate, up, gate.numel(), hidden)
        return hidden
    return F.silu(gate).mul_(up)


@_region
def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute h once more, and the gradients of gate and up from that of h, which may be written over."""
    if _has_cpu_kernel(gate, up, grad):
        outputs = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
        call("swiglu_backward", gate.dtype, gate, up, grad, gate.numel(), *outputs)
        return outputs
    active = F.silu(gate)
    hidden = active * up
    grad_up = active.mul_(grad)
    grad_gate: Tensor = torch.ops.aten.silu_backward(grad.mul_(up), gate)
    return hidden, grad_gate, grad_up


def _has_cpu_kernel(*states: Tensor) -> bool:
    """Whether the C++ loops take states ``(n_tokens, intermediate)``."""
    first = states[0]
    alike = all((each.dtype, each.shape, each.is_contiguous()) == (first.dtype, first.shape, True) for each in states)
    return alike and all(map(is_here, states)) and first.numel() % 16 == 0 and has_function("swiglu", first.dtype)


# ---- rotary position embedding --------------------------------------------------------------------------------------


class Rotary(torch.autograd.Function):
    """Rotate each pair ``(x[i], x[i + half])`` by its position's angle (Su et al. 2021, RoFormer).

    As transformers' ``apply_rotary_pos_emb`` lays pairs out. The angles get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate both, ``(1, heads, n_tokens, head_dim)``, by ``cos`` and ``sin`` ``(1, n_tokens, head_dim)``."""
        ctx.save_for_backward(cos, sin)
        return _rotate(query, key, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return *_rotate(grad_q, grad_k, cos, sin, -1), None, None


@_region
def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """Rotate, or in backward, with a ``sign`` of -1, the other way. Both halves of the angles are the same."""
    cos, sin, half = cos[:, None], sin[:, None], query.shape[-1] // 2

    def rotate(states: Tensor) -> Tensor:
        rotated = states * cos
        rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-sign)
        rotated[..., half:].addcmul_(states[..., :half], sin[..., half:], value=sign)
        return rotated

    return rotate(query), rotate(key)
