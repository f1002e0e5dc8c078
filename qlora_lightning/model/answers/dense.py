"""A 4-bit base made dense for a while: generation would else dequantize every weight for every token."""

import contextlib
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import psutil
import torch
from torch import nn

_SHARE = 0.5  # of the free memory that the dense weights may take


@contextlib.contextmanager
def dense_weights(model: nn.Module) -> Iterator[bool]:
    """Hold every 4-bit linear's weight in its compute dtype, as it is multiplied anyway, if there is memory for it.

    Nothing is merged: adapters act as before, and every product has the same operands. Afterwards the 4-bit linears
    are back, untouched. A second call inside the first changes nothing.

    Yields:
        Whether the weights are dense now.
    """
    linears = _quantized_linears(model)
    if not linears or not _fits(linears):
        yield not linears
        return
    try:
        for parent, name, linear in linears:
            setattr(parent, name, _made_dense(linear))
        yield True
    finally:
        for parent, name, linear in linears:
            setattr(parent, name, linear)


def _quantized_linears(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    return [(parent, name, child) for parent, name, child in found if type(child) is bnb.nn.Linear4bit]


def _fits(linears: list[tuple[nn.Module, str, Any]]) -> bool:
    needed = sum(linear.in_features * linear.out_features * _dtype_of(linear).itemsize for _, _, linear in linears)
    device = linears[0][2].weight.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return bool(needed <= _SHARE * free)


def _dtype_of(linear: Any) -> torch.dtype:
    dtype: torch.dtype = linear.compute_dtype or linear.weight.quant_state.dtype
    return dtype


@torch.no_grad()
def _made_dense(linear: Any) -> nn.Linear:
    weight = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(_dtype_of(linear))
    has_bias = linear.bias is not None
    dense = nn.Linear(linear.in_features, linear.out_features, bias=has_bias, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if has_bias:
        dense.bias = nn.Parameter(linear.bias.to(weight.dtype), requires_grad=False)
    return dense.train(linear.training)
