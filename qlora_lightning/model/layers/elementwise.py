"""RMSNorm, rotary position embedding and SwiGLU, forward and backward, which save little.

Each is a region: element-wise code, which a GPU runs as one compiled kernel. A CPU runs it one operation at a time,
except SwiGLU, whose exponentials cost most: it is in C++.
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
_Function = TypeVar("_Function", bound=Callable[..., Any])
# The dimension of tokens, by the rank of a tensor: (tokens, width), (1, tokens, …), (1, heads, tokens, …)
_TOKEN_DIM = {2: 0, 3: 1, 4: 2}


def _region(function: _Function) -> _Function:
    """Make element-wise code a region: a GPU with Triton runs it as one compiled kernel for any number of tokens."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if not (arguments[0].is_cuda and has_triton()):
            return function(*arguments)
        # of an activation that requires gradients the compiler would read `.grad`, of which torch warns
        arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
        mark_tokens(arguments)
        return compile_region(function)(*arguments)

    return cast(_Function, run)


@functools.cache
def compile_region(function: Callable[..., Any], backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """Compile a region for any number of tokens, but once for each width: a kernel that knows it is faster."""
    return torch.compile(function, dynamic=False, backend=backend)


def mark_tokens(arguments: Iterable[Any]) -> None:
    """Mark each tensor's dimension of tokens as dynamic for the compiler; see :data:`_TOKEN_DIM`."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.dim() in _TOKEN_DIM:
            torch._dynamo.maybe_mark_dynamic(argument, _TOKEN_DIM[argument.dim()])


@functools.cache
def has_triton() -> bool:
    """Whether Triton compiles a kernel here: it needs a C compiler, Python's headers and a recent enough GPU."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device="cuda"))
    except Exception as error:  # from Triton, its compiler or torch's
        reason = str(error).strip().partition("\n")[0]
        _log.warning("Triton compiles nothing here (%s): norm, rotary and SwiGLU take several kernels each.", reason)
        return False
    return True


# ---- RMSNorm (Zhang and Sennrich 2019) with a frozen weight ---------------------------------------------------------


@_region
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the norm's output and ``1 / sqrt(mean(x²) + eps)`` of each row, ``(rows, 1)``, at least in float32.

    Like transformers it rounds before it multiplies by the weight.
    """
    x_float = _to_float32(x)
    square_sum: Tensor = torch.linalg.vector_norm(x_float, dim=-1, keepdim=True).square_()
    inverse_rms = square_sum.div_(x.shape[-1]).add_(eps).rsqrt_()
    return x_float.mul_(inverse_rms).to(x.dtype, copy=True).mul_(weight), inverse_rms


@_region
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Compute the gradient of x, ``inverse (w g - x̂ mean(w g x̂))`` where ``x̂ = x · inverse``, from the output's."""
    x_hat = _to_float32(x).mul_(inverse)
    weighted_grad = _to_float32(grad).mul_(weight.to(x_hat.dtype))
    mean = (x_hat * weighted_grad).mean(-1, keepdim=True)
    return weighted_grad.addcmul_(x_hat, mean, value=-1).mul_(inverse).to(x.dtype)


def _to_float32(x: Tensor) -> Tensor:
    """Copy to float32, or float64, once: each operation on mixed dtypes would make such a copy."""
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
    """Recompute h, and compute the gradients of gate and up from that of h, which may be overwritten."""
    if _has_cpu_kernel(gate, up, grad):
        outputs = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
        call("swiglu_backward", gate.dtype, gate, up, grad, gate.numel(), *outputs)
        return outputs
    silu_gate = F.silu(gate)
    hidden = silu_gate * up
    grad_up = silu_gate.mul_(grad)
    grad_gate: Tensor = torch.ops.aten.silu_backward(grad.mul_(up), gate)
    return hidden, grad_gate, grad_up


def _has_cpu_kernel(*states: Tensor) -> bool:
    """Whether the C++ loops take states ``(n_tokens, intermediate)``."""
    gate = states[0]
    is_uniform = all((x.dtype, x.shape, x.is_contiguous()) == (gate.dtype, gate.shape, True) for x in states)
    return is_uniform and all(map(is_here, states)) and gate.numel() % 16 == 0 and has_function("swiglu", gate.dtype)


# ---- rotary position embedding --------------------------------------------------------------------------------------


class Rotary(torch.autograd.Function):
    """Rotate each pair ``(x[i], x[i + half])`` by its position's angle (Su et al. 2021, RoFormer).

    Pairs are as in transformers' ``apply_rotary_pos_emb``. The angles get no gradient.
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
    """Rotate by the angles times ``sign``, which is -1 in backward. Both halves of the angles are the same."""
    cos, sin, half = cos[:, None], sin[:, None], query.shape[-1] // 2

    def rotate(states: Tensor) -> Tensor:
        rotated = states * cos
        rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-sign)
        rotated[..., half:].addcmul_(states[..., :half], sin[..., half:], value=sign)
        return rotated

    return rotate(query), rotate(key)
