"""The products of a linear's frozen weight: one in 4 bits is made dense for each, a large one a tile at a time."""

import math
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from torch import Tensor

TILE_BYTES = 8 << 20  # dense: what a product has just made is still in the CPU's cache, and the memory is used again


class FrozenWeight:
    """A weight W ``(out, in)`` that does not train.

    On a CPU the dense form of one in 4 bits is never there as a whole if it is larger than :data:`TILE_BYTES`: of
    Llama-3.1-8B's widest linears it has 117 MB. The products are the same to the last bit, as each of their numbers
    comes from one tile.
    """

    def __init__(self, stored: Any) -> None:
        """Wrap a parameter of a linear, ``Params4bit`` or plain."""
        self.stored = stored

    def multiply(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Compute ``(onto +) x Wᵀ``, ``(tokens, out)``.

        Args:
            x: ``(tokens, in)``.
            onto: ``(tokens, out)``, in x's dtype; the sum takes its place.
        """
        return self._multiply(x, 0, onto)

    def multiply_back(self, grad: Tensor, onto: Tensor | None = None) -> Tensor:
        """Compute ``(onto +) g W``, ``(tokens, in)``: the gradient of x from that of the output.

        Args:
            grad: ``(tokens, out)``.
            onto: ``(tokens, in)``, in the gradient's dtype; the sum takes its place.
        """
        return self._multiply(grad, 1, onto)

    def _multiply(self, left: Tensor, dim: int, onto: Tensor | None) -> Tensor:
        """Multiply by W so that the result is as wide as W's dimension ``dim``: by Wᵀ (0) or by W (1)."""
        if not self._has_tiles(left.dtype):
            right = _turn(self._make_dense(left.dtype), dim)
            return left @ right if onto is None else onto.addmm_(left, right)
        output = left.new_empty(len(left), self.stored.quant_state.shape[dim]) if onto is None else onto
        for columns, tile in self._tiles(dim, left.dtype):
            right, part = _turn(tile, dim), output[:, columns]
            if onto is None:
                torch.mm(left, right, out=part)
            else:
                part.addmm_(left, right)
        return output

    def _make_dense(self, dtype: torch.dtype) -> Tensor:
        weight = self.stored
        if isinstance(weight, bnb.nn.Params4bit):
            weight = dequantize_4bit(weight.data, weight.quant_state)
        made: Tensor = weight.to(dtype)
        return made

    def _has_tiles(self, dtype: torch.dtype) -> bool:
        weight = self.stored
        if not isinstance(weight, bnb.nn.Params4bit):
            return False
        state = weight.quant_state
        is_large = state.shape.numel() * dtype.itemsize > TILE_BYTES  # first: to ask a Params4bit for more takes longer
        return bool(
            is_large
            and state.shape[1] % state.blocksize == 0
            and weight.device.type == "cpu"
            and weight.dtype == torch.uint8
        )

    def _tiles(self, dim: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Give the weight dense in strips of rows (``dim`` 0) or columns (1), and where each lies."""
        state = self.stored.quant_state
        packed = self.stored.data.view(state.shape[0], -1)  # two numbers a byte
        scales = _scales(state).view(state.shape[0], -1)  # one for each block of numbers
        count = math.ceil(state.shape.numel() * dtype.itemsize / TILE_BYTES)
        width = math.ceil(state.shape[dim] / count / state.blocksize) * state.blocksize
        for start in range(0, state.shape[dim], width):
            length = min(width, state.shape[dim] - start)
            per_byte, per_scale = (1, 1) if dim == 0 else (2, state.blocksize)
            strip = packed.narrow(dim, start // per_byte, length // per_byte).contiguous()
            of_strip = QuantState(
                scales.narrow(dim, start // per_scale, length // per_scale).contiguous(),
                torch.Size((length, state.shape[1]) if dim == 0 else (state.shape[0], length)),
                state.code,
                state.blocksize,
                state.quant_type,
                state.dtype,
            )
            yield slice(start, start + length), dequantize_4bit(strip.view(-1, 1), of_strip).to(dtype)


def _turn(dense: Tensor, dim: int) -> Tensor:
    return dense.t() if dim == 0 else dense


def _scales(state: QuantState) -> Tensor:
    """Give the blocks' scales, which double quantization keeps in 8 bits."""
    scales: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return scales
