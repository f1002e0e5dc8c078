"""The matrix-product ceiling: how long a step would take if it were its products alone, at this machine's best."""

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.products import Product

_FEWEST_TRIES, _SHORTEST = 5, 0.02  # of each shape, and the seconds that all its tries take at least
_CALLS_ON_GPU = 20  # between two synchronizations, which would cost more than a small product


def measure_ceiling(products: Counter[Product], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Time each shape on its own, the best of a few tries, as often as it occurs.

    Args:
        products: how often each occurs.
        dtype: of both operands.
        device: where they are.

    Returns:
        ``seconds`` and ``flop`` of all, and of each of the ``parts``.
    """
    parts: dict[str, dict[str, float]] = {}
    for product, count in products.items():
        part = parts.setdefault(product.part, {"seconds": 0.0, "flop": 0})
        part["seconds"] += count * time_product(product, dtype, device)
        part["flop"] += count * product.flop
    return {key: sum(part[key] for part in parts.values()) for key in ("seconds", "flop")} | {"parts": parts}


def time_product(product: Product, dtype: torch.dtype, device: torch.device) -> float:
    """Give the seconds of one product at its best."""
    left = _operand(product.batch, product.rows, product.inner, product.layout == "tn", dtype, device)
    right = _operand(product.batch, product.inner, product.columns, product.layout == "nt", dtype, device)
    multiply = torch.mm if product.batch == 1 else torch.bmm
    result = multiply(left, right)  # also warms up
    on_gpu = device.type == "cuda"
    calls = _CALLS_ON_GPU if on_gpu else 1

    def one_try() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            multiply(left, right, out=result)
        if on_gpu:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / calls

    tries: list[float] = []
    while len(tries) < _FEWEST_TRIES or sum(tries) < _SHORTEST:
        tries.append(one_try())
    return min(tries)


def _operand(batch: int, rows: int, columns: int, transposed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    stored = (columns, rows) if transposed else (rows, columns)
    made = torch.randn(stored if batch == 1 else (batch, *stored), dtype=dtype, device=device)
    return made.transpose(-2, -1) if transposed else made
