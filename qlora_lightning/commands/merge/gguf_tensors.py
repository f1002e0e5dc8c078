"""Tensors as llama.cpp wants them: their names, the order of rows in queries and keys, and how they are stored."""

import functools
import re
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
from torch import Tensor

from qlora_lightning.support.errors import UserError

Array = npt.NDArray[Any]
_BLOCK = 32  # weights that share a scale in Q8_0


class Stored(NamedTuple):
    """How one tensor lies in a GGUF file: ``raw`` is the ggml type."""

    raw: gguf.GGMLQuantizationType
    size_bytes: int


def map_name(name: str, layers: int) -> str:
    """Give llama.cpp's name of a tensor of a LLaMA.

    Raises:
        UserError: llama.cpp knows no such tensor.
    """
    found: str | None = _name_map(layers).get_name(name, (".weight", ".bias"))
    if found is None:
        raise UserError(f"--gguf: llama.cpp has no place for the tensor {name}. Leave --gguf out.")
    return found


@functools.cache  # it takes 10 ms to make
def _name_map(layers: int) -> Any:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)


def permute_rows(name: str, rows: Array, config: Any) -> Array:
    """Put the rows of queries and keys into the order in which llama.cpp rotates: pairs side by side.

    transformers rotates the first half of a head's rows against the second.

    Args:
        name: Of the tensor in transformers; others than queries and keys come back as they are.
        rows: ``(out, …)``: a weight, a bias, or the B of an adapter.
        config: Of the model.
    """
    found = re.search(r"\.(q|k)_proj\.", name)
    if found is None:
        return rows
    heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def choose_storage(shape: tuple[int, ...], kind: str) -> Stored:
    """Say how a tensor is stored: vectors in fp32, matrices as asked, and in f16 where their rows hold no whole blocks.

    Args:
        shape: Of the tensor.
        kind: ``f16`` or ``q8_0``.
    """
    types = gguf.GGMLQuantizationType
    count = int(np.prod(shape))
    if len(shape) == 1:
        return Stored(types.F32, 4 * count)
    if kind == "q8_0" and shape[-1] % _BLOCK == 0:
        return Stored(types.Q8_0, count // _BLOCK * (_BLOCK + 2))
    return Stored(types.F16, 2 * count)


def encode(tensor: Tensor, name: str, stored: Stored, config: Any) -> Array:
    """Give the bytes of a tensor as llama.cpp reads them.

    Raises:
        UserError: A weight is too large for f16.
    """
    values = permute_rows(name, tensor.float().numpy(), config)
    if stored.raw == gguf.GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise UserError(f"--gguf: {name} holds a weight beyond what f16 can say. Leave --gguf out.")
    encoded: Array = gguf.quants.quantize(np.ascontiguousarray(values), stored.raw)
    return encoded
