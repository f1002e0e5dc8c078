"""What ``loops.cpp`` and ``attention.cpp`` compute, for tensors."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lightning.model.kernels.compiler import load_library

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_float = ctypes.c_float
_LANES, _MOST_WIDE = 16, 256  # numbers of a head of attention: a multiple of the first, up to the second


def can_run(*tensors: Tensor) -> bool:
    """Whether the loops are there and take these: on the CPU, of one dtype, 32 or 16 bits wide, without gaps."""
    dtype = tensors[0].dtype
    return (
        dtype in _NAMES
        and all(
            not is_traced(each) and each.device.type == "cpu" and each.dtype == dtype and each.is_contiguous()
            for each in tensors
        )
        and not torch.compiler.is_compiling()
        and load_library() is not None
    )


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor may hold no numbers, as those of torch's tracers."""
    return type(tensor) not in (Tensor, nn.Parameter)


def can_attend(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is attention in a dtype for such values, ``(…, head_dim)``, on this CPU.

    In bfloat16 it takes AVX512-BF16: a CPU without has no use for that dtype.
    """
    width = value.shape[-1]
    fits = value.device.type == "cpu" and not is_traced(value) and width % _LANES == 0 and width <= _MOST_WIDE
    return fits and attends_in(dtype)


def attends_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has attention in a dtype."""
    return dtype in _NAMES and hasattr(load_library(), f"attend_{_NAMES[dtype]}")


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Give ``weight · x / rms(x)`` of each row, ``(rows, width)``, and ``1 / rms(x)``, ``(rows, 1)`` in float32."""
    normed, inverse = torch.empty_like(x), torch.empty(len(x), 1)
    _call("normalize", x, x, weight, _float(eps), False, normed, inverse, *x.shape)
    return normed, inverse


def normalize_again(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Give the first of what :func:`normalize` gives, from the second."""
    normed = torch.empty_like(x)
    _call("normalize", x, x, weight, _float(0), True, normed, inverse, *x.shape)
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
    _call("rotate", x, x, cos, sin, _float(-1 if back else 1), turned, *x.shape)
    return turned


def attend(query: Tensor, key: Tensor, value: Tensor, samples: Any, scale: float) -> tuple[Tensor, Tensor]:
    """Attend within samples.

    Args:
        query: ``(tokens, heads, head_dim)``.
        key: ``(tokens, kv_heads, head_dim)``.
        value: Likewise.
        samples: :class:`~qlora_lightning.model.layers.sample_attention.Samples` of the stream.
        scale: Factor on the scores.

    Returns:
        The mixed values, as the queries are, and the logarithm of the sum of each row's exponentials,
        ``(tokens, heads)`` in float32.
    """
    mixed, normalizers = torch.empty_like(query), torch.empty(query.shape[:2])
    of_samples = samples.bounds, samples.own, samples.places, len(samples.own)
    _call("attend", query, query, key, value, *of_samples, *_widths(query, key), _float(scale), mixed, normalizers)
    return mixed, normalizers


def attend_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, normalizers: Tensor, samples: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of queries, keys and values from that of the mixed values, ``(tokens, heads, head_dim)``."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    parts = torch.empty(2 * samples.share, len(samples.places), *key.shape[1:])
    _call(
        "attend_backward",
        *(query, query, key, value, grad, normalizers, *samples, len(samples.own), len(query)),
        *(*_widths(query, key), _float(scale), parts, *grads),
    )
    return grads


def _widths(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    return query.shape[1], *key.shape[1:]


def _call(name: str, like: Tensor, *arguments: Any) -> None:
    function = getattr(load_library(), f"{name}_{_NAMES[like.dtype]}")
    function(*map(_to_c, arguments))


def _to_c(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument
