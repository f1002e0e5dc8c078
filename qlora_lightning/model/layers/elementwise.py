"""RMSNorm, rotary position embedding and SwiGLU, forward and backward, saving little.

A GPU runs each as one kernel from kernels.py. A CPU runs torch's operations.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lightning.support.errors import describe_error, is_out_of_memory

_SLOWER = "norm, rotary, SwiGLU and loss each run as several torch kernels."
_log = logging.getLogger(__name__)
_distrusted = False  # whether a kernel failed, or its result differed from torch's
_Function = TypeVar("_Function", bound=Callable[..., Any])


def has_kernel(function: _Function) -> _Function:
    """Run the Triton kernel of the same name in place of a function, on a GPU with Triton."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        first = arguments[0]
        kernels = triton_kernels(first.device.type) if first.is_cuda else None
        if kernels is None:
            return function(*arguments)
        if first.get_device() != torch.cuda.current_device():  # where Triton would launch it
            with torch.cuda.device(first.device):
                return run(*arguments)
        try:
            return getattr(kernels, function.__name__)(*arguments)
        except Exception as error:  # from Triton or its compiler, before any launch
            if is_out_of_memory(error):
                raise
            _log.warning("Triton cannot run %s here (%s): %s", function.__name__, describe_error(error), _SLOWER)
            distrust_kernels()
        return function(*arguments)

    return cast(_Function, run)


def triton_kernels(device_type: str) -> Any:
    """Return the module of kernels; ``None`` without Triton, or if a kernel is not trusted in this process."""
    return None if _distrusted or device_type != "cuda" else _import_kernels()


@functools.cache
def _import_kernels() -> Any:
    try:
        from qlora_lightning.model.layers import kernels
    except ImportError as error:
        _log.warning("Triton is not available (%s): %s", describe_error(error), _SLOWER)
        return None
    return kernels


def distrust_kernels() -> None:
    """Run torch's operations instead of Triton's kernels from now on in this process."""
    global _distrusted
    _distrusted = True


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Run torch's operations instead of Triton's kernels inside this context."""
    global _distrusted
    before, _distrusted = _distrusted, True
    try:
        yield
    finally:
        _distrusted = before


# ---- RMSNorm (Zhang and Sennrich 2019) with a frozen weight ---------------------------------------------------------


@has_kernel
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the norm's output, and ``1 / sqrt(mean(x²) + eps)`` of each row, ``(rows, 1)``, at least in float32.

    Like transformers, it rounds before it multiplies by the weight.
    """
    x_float = _to_float32(x)
    square_sum: Tensor = torch.linalg.vector_norm(x_float, dim=-1, keepdim=True).square_()
    inverse_rms = square_sum.div_(x.shape[-1]).add_(eps).rsqrt_()
    return x_float.mul_(inverse_rms).to(x.dtype, copy=True).mul_(weight), inverse_rms


@has_kernel
def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, grad_residual: Tensor | None = None
) -> Tensor:
    """Compute x's gradient ``inverse (w g - x̂ mean(w g x̂))``, with ``x̂ = x · inverse``, from the output's gradient g.

    The result includes ``grad_residual``, the gradient from the other use of x.
    """
    x_hat = _to_float32(x).mul_(inverse)
    weighted_grad = _to_float32(grad).mul_(weight.to(x_hat.dtype))
    mean = (x_hat * weighted_grad).mean(-1, keepdim=True)
    grad_x = weighted_grad.addcmul_(x_hat, mean, value=-1).mul_(inverse).to(x.dtype)
    return grad_x if grad_residual is None else grad_x.add_(grad_residual)


def _to_float32(x: Tensor) -> Tensor:
    """Copy to float32, or float64, once; otherwise each operation on mixed dtypes would make such a copy."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


# ---- SwiGLU (Shazeer 2020, GLU variants) ----------------------------------------------------------------------------


@has_kernel
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute ``h = silu(gate) · up``."""
    return F.silu(gate).mul_(up)


@has_kernel
def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute h, and compute the gradients of gate and up from h's gradient, which may be overwritten."""
    silu_gate = F.silu(gate)
    hidden = silu_gate * up
    grad_up = silu_gate.mul_(grad)
    grad_gate: Tensor = torch.ops.aten.silu_backward(grad.mul_(up), gate)
    return hidden, grad_gate, grad_up


# ---- rotary position embedding --------------------------------------------------------------------------------------


class Rotary(torch.autograd.Function):
    """Rotate each pair ``(x[i], x[i + half])`` by its position's angle (Su et al. 2021, RoFormer).

    The pairs are those of transformers' ``apply_rotary_pos_emb``. The angles get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate query and key ``(n_tokens, heads, head_dim)`` by ``cos`` and ``sin`` ``(1, n_tokens, head_dim)``."""
        ctx.angles = cos, sin
        return rotate(query, key, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.angles
        return *rotate(grad_q, grad_k, cos, sin, -1), None, None


@has_kernel
def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """Rotate by the angles times ``sign``, which is -1 in backward; both halves of the angles are the same."""
    cos, sin, half = cos[0, :, None], sin[0, :, None], query.shape[-1] // 2  # (n_tokens, 1, head_dim)

    def rotate_states(states: Tensor) -> Tensor:
        rotated = states * cos
        rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-sign)
        rotated[..., half:].addcmul_(states[..., :half], sin[..., half:], value=sign)
        return rotated

    return rotate_states(query), rotate_states(key)
