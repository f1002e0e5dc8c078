"""Bases published in FP8: the layouts that are read, and a weight of theirs dequantized."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Scales of what a server rounds too: activations, and the cache of keys and values. Training rounds neither.
OF_ACTIVATIONS = (".activation_scale", ".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale")
_BAND = 256  # rows that are in fp32 at a time


class Fp8Layout(NamedTuple):
    """How a base in FP8 is stored.

    Attributes:
        suffix: What a weight's scales are called, after the name of the weight.
        block: Rows and columns that share a scale, where a weight has scales for blocks.
    """

    suffix: str
    block: tuple[int, int]


def fp8_layout(settings: Mapping[str, Any]) -> Fp8Layout | None:
    """Return the layout that a base's ``quantization_config`` names; ``None`` if it is not FP8, or in part only."""
    with contextlib.suppress(AttributeError, IndexError, TypeError, ValueError):  # no such settings
        if settings.get("quant_method") == "fp8" and settings.get("expert_dtype", "fp8") == "fp8":
            return _layout("_scale_inv", settings.get("weight_block_size") or (128, 128))
        # a transform rotates weights, sparse ones are stored by their places
        if settings.get("quant_method") == "compressed-tensors" and not settings.get("transform_config"):
            groups = [group["weights"] for group in settings.get("config_groups", {}).values()]
            blocks = [group.get("block_structure") or (128, 128) for group in groups]
            is_fp8 = all((group["type"], group["num_bits"]) == ("float", 8) for group in groups)
            has_known_scales = all(group["strategy"] in ("tensor", "channel", "block") for group in groups)
            is_dense = (settings.get("sparsity_config") or {}).get("format", "dense") == "dense"
            if is_fp8 and has_known_scales and is_dense and len({(*block,) for block in blocks}) == 1:
                return _layout("_scale", blocks[0])
    return None


def _layout(suffix: str, block: Sequence[Any]) -> Fp8Layout | None:
    rows, columns = block
    is_valid = all(isinstance(size, int) and size > 0 for size in (rows, columns))
    return Fp8Layout(suffix, (rows, columns)) if is_valid else None


def dequantize_fp8(weight: "Tensor", scales: "Tensor", block: tuple[int, int], dtype: "torch.dtype") -> "Tensor":
    """Multiply a weight ``(…, rows, columns)`` by its scales in fp32, a band of rows at a time.

    transformers' ``Fp8Dequantize`` has the same products, but takes the blocks of 192 rows and two scales for 96 rows.

    Args:
        weight: FP8, of one matrix or of all experts.
        scales: One for each matrix, for each of its rows, or for each block, of which the last may be smaller.
        block: Rows and columns of a block.
        dtype: Of the result.

    Raises:
        ValueError: The scales are not as many.
    """
    *leading, rows, columns = weight.shape
    n_matrices = math.prod(leading)
    is_grid = scales.dim() > 1 and scales.numel() > n_matrices  # else there is one for each matrix, or one in all
    n_scales = tuple(scales.shape[-2:]) if is_grid else (1, 1)
    if not weight.is_floating_point():
        raise ValueError(f"a weight of {weight.dtype}")
    known = ((1, 1), (rows, 1), (math.ceil(rows / block[0]), math.ceil(columns / block[1])))
    if n_scales not in known or not scales.is_floating_point():
        raise ValueError(f"scales {[*scales.shape]} of {scales.dtype} for a weight {[*weight.shape]}")
    height = 1 if n_scales[0] == rows else block[0] if n_scales[0] > 1 else rows
    width = block[1] if n_scales[1] > 1 else columns
    matrices, dense = weight.view(-1, rows, columns), weight.new_empty(weight.shape, dtype=dtype)
    of_matrices = scales.float().reshape(-1, *n_scales).expand(n_matrices, -1, -1)
    for matrix, of_matrix, target in zip(matrices, of_matrices, dense.view(matrices.shape), strict=True):
        of_rows = of_matrix.repeat_interleave(height, 0)[:rows]
        for start in range(0, rows, _BAND):
            band = slice(start, start + _BAND)
            target[band] = matrix[band].float() * of_rows[band].repeat_interleave(width, 1)[:, :columns]
    return dense
