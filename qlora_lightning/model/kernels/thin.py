"""What ``thin.cpp`` computes, for tensors: products with the thin matrices of adapters."""

import torch
from torch import Tensor

from qlora_lightning.model.kernels.library import call_with_scratch, has_numbers, is_there

_WIDTH = 32  # of the wide side: a multiple of it
_PARTS, _GROUP = 16, 8  # as in thin.cpp


def can_narrow(wide: Tensor) -> bool:
    """Whether there are such products with ``wide``: in bfloat16, by AVX512-BF16."""
    return (
        wide.dtype is torch.bfloat16
        and has_numbers(wide)
        and wide.shape[1] % _WIDTH == 0
        and wide.stride(1) == 1
        and is_there("thin", wide.dtype)
    )


def narrow(wide: Tensor, matrix: Tensor) -> Tensor:
    """Compute ``wide matrixᵀ``, ``(rows, rank)``.

    Args:
        wide: ``(rows, width)``, in bfloat16.
        matrix: ``(rank, width)`` in float32, used in bfloat16.
    """
    narrowed = wide.new_empty(len(wide), len(matrix))
    _call(wide, matrix, len(matrix), 1.0, narrowed, None, None)
    return narrowed


def partner(wide: Tensor, low: Tensor) -> Tensor:
    """Compute ``lowᵀ wide`` in float32, ``(rank, width)``.

    Args:
        wide: ``(rows, width)``, in bfloat16.
        low: ``(rows, rank)``, likewise.
    """
    result = wide.new_empty(low.shape[1], wide.shape[1], dtype=torch.float32)
    _call(wide, None, low.shape[1], 1.0, None, low, result)
    return result


def narrow_and_partner(wide: Tensor, matrix: Tensor, low: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Give both, times ``factor``, reading ``wide`` once; the second lies in memory as ``matrix`` does."""
    narrowed, result = wide.new_empty(len(wide), len(matrix)), torch.empty_like(matrix)
    _call(wide, matrix, len(matrix), factor, narrowed, low, result)
    return narrowed, result


def _call(
    wide: Tensor,
    matrix: Tensor | None,
    rank: int,
    factor: float,
    narrowed: Tensor | None,
    low: Tensor | None,
    result: Tensor | None,
) -> None:
    (rows, width), filled = wide.shape, -(-rank // _GROUP) * _GROUP
    parts = None if result is None else wide.new_empty(_PARTS, filled, width, dtype=torch.float32)
    of_wide = wide, wide.stride(0), rows, width
    of_low = *_by_row(narrowed), *_by_row(low)
    call_with_scratch(
        "thin", wide.dtype, *of_wide, *_by_both(matrix), rank, float(factor), *of_low, parts, *_by_both(result)
    )


def _by_row(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    return tensor, 0 if tensor is None else tensor.stride(0)


def _by_both(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    return *_by_row(tensor), 0 if tensor is None else tensor.stride(1)
