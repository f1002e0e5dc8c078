"""What ``loops.cpp`` computes, for tensors."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lightning.model.kernels.compiler import load_library

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_PLAIN = (Tensor, nn.Parameter)  # others, as torch's tracers have them, may hold no numbers


def can_run(*tensors: Tensor) -> bool:
    """Whether the loops are there and take these: on the CPU, of one dtype, 32 or 16 bits wide, without gaps."""
    dtype = tensors[0].dtype
    return (
        dtype in _NAMES
        and all(
            type(each) in _PLAIN and each.device.type == "cpu" and each.dtype == dtype and each.is_contiguous()
            for each in tensors
        )
        and not torch.compiler.is_compiling()
        and load_library() is not None
    )


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Give ``weight · x / rms(x)`` of each row, ``(rows, width)``, and ``1 / rms(x)``, ``(rows, 1)`` in float32."""
    normed, inverse = torch.empty_like(x), torch.empty(len(x), 1)
    _call("normalize", x, x, weight, ctypes.c_float(eps), False, normed, inverse, *x.shape)
    return normed, inverse


def normalize_again(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Give the first of what :func:`normalize` gives, from the second."""
    normed = torch.empty_like(x)
    _call("normalize", x, x, weight, ctypes.c_float(0), True, normed, inverse, *x.shape)
    return normed


def normalize_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Give the gradient of x in the place of that of the normed rows."""
    _call("normalize_backward", x, x, weight, inverse, grad, *x.shape)
    return grad


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Give ``silu(gate) · up``."""
    hidden = torch.empty_like(gate)
    _call("swiglu", gate, gate, up, hidden, gate.numel())
    return hidden


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give ``silu(gate) · up`` and the gradients of gate and up; the first of these in the place of the given one."""
    hidden, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _call("swiglu_backward", gate, gate, up, grad, grad_up, hidden, gate.numel())
    return hidden, grad, grad_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Turn pairs of ``(tokens, heads, width)`` by angles ``(tokens, width)``; ``back`` gives the gradient of that."""
    turned = torch.empty_like(x)
    _call("rotate", x, x, cos, sin, ctypes.c_float(-1 if back else 1), turned, *x.shape)
    return turned


def _call(name: str, like: Tensor, *arguments: Any) -> None:
    function = getattr(load_library(), f"{name}_{_NAMES[like.dtype]}")
    function(*map(_to_c, arguments))


def _to_c(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument
