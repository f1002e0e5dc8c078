"""What ``products.cpp`` computes, for tensors: products with frozen weights; one in 4 bits is never dense in memory."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from qlora_lightning.model.cpu.library import call, has_numbers, is_there

_COLUMNS = 32  # of a panel: a result has a multiple of them
_DEPTH = 32  # numbers of a row that are read at a time: a block of them with one scale has a multiple of it


def can_multiply(weight: Any, left: Tensor, *, backward: bool) -> bool:
    """Whether there is a product of rows with a frozen weight, in 4 bits or dense: in bfloat16, by AVX512-BF16.

    If the CPU has AMX, torch's products are several times quicker. Shapes that do not fit are torch's to report.
    """
    if left.dtype is not torch.bfloat16 or left.stride(-1) != 1:
        return False
    if isinstance(weight, bnb.nn.Params4bit):
        state = weight.quant_state
        numbers, shape, block = state.code, state.shape, state.blocksize
    elif weight.dtype is left.dtype and weight.is_contiguous():
        numbers, shape, block = weight, weight.shape, _DEPTH
    else:
        return False
    return (
        has_numbers(left, numbers)
        and left.shape[1] == shape[0 if backward else 1]
        and shape[0] % _COLUMNS == 0
        and shape[1] % block == 0
        and block % _DEPTH == 0
        and is_there("multiply", left.dtype)
        and not _has_amx()
    )


@functools.cache
def _has_amx() -> bool:
    return " amx_bf16 " in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def multiply(
    lefts: Sequence[Tensor],
    weights: Sequence[Any],
    backward: bool,
    xa: Tensor | None = None,
    matrix: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute ``Σ x Wᵀ + scaling · xa Bᵀ + bias + residual``, or backward ``Σ g W + scaling · xa A``, rounded once.

    Args:
        lefts: x, ``(rows, in)``, or g, ``(rows, out)``, of each weight, in bfloat16.
        weights: Params4bit or dense ones of ``(out, in)``; see :func:`can_multiply`.
        backward: Whether to multiply by W rather than by its transpose.
        xa: ``x Aᵀ``, ``(rows, rank)``, of an even rank; backward its gradient.
        matrix: B, ``(out, rank)``, or backward A, ``(rank, in)``.
        scaling: Factor on their product.
        bias: ``(out,)``.
        residual: As the result, without gaps.

    Returns:
        ``(rows, out)``, backward ``(rows, in)``.
    """
    with torch._C.DisableTorchFunctionSubclass():  # asking a Params4bit is ten times quicker
        factors = (_Weight * len(weights))(*(_describe(*each) for each in zip(lefts, weights, strict=True)))
    rows, columns = len(lefts[0]), factors[0].inputs if backward else factors[0].outputs
    result = lefts[0].new_empty(rows, columns)
    matrix = None if matrix is None else matrix.contiguous()
    adapter = (None, 0, 0, None) if xa is None else (xa, xa.stride(0), xa.shape[1], matrix)
    sums = bias, residual, result
    call("multiply", result.dtype, factors, len(factors), backward, *adapter, float(scaling), *sums, rows, columns)
    return result


class _Weight(ctypes.Structure):
    """``Weight`` of ``products.cpp``."""

    _fields_ = (
        ("left", ctypes.c_void_p),
        ("by_row", ctypes.c_int64),
        ("numbers", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scale_table", ctypes.c_void_p),
        ("scale_scales", ctypes.c_void_p),
        ("block", ctypes.c_int64),
        ("block_of_scales", ctypes.c_int64),
        ("offset", ctypes.c_double),
    )


def _describe(left: Tensor, weight: Any) -> _Weight:
    of_left = left.data_ptr(), left.stride(0)
    if not (numbers := weight.data_ptr()):
        raise RuntimeError("This weight is sharded, and whole only while its decoder layer runs.")
    if not isinstance(weight, bnb.nn.Params4bit):
        return _Weight(*of_left, numbers, *weight.shape, None, None, None, None, None, _DEPTH, 1, 0.0)
    state = weight.quant_state
    of_weight = numbers, *state.shape, state.code.data_ptr()
    if not state.nested:
        return _Weight(*of_left, *of_weight, state.absmax.data_ptr(), None, None, None, state.blocksize, 1, 0.0)
    inner = state.state2
    nested = state.absmax.data_ptr(), inner.code.data_ptr(), inner.absmax.data_ptr()
    return _Weight(*of_left, *of_weight, None, *nested, state.blocksize, inner.blocksize, float(state.offset))
