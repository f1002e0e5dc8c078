"""The matrix-product ceiling: how long a step takes that is its products alone."""

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.products import Product


def measure_ceiling(products: Counter[Product], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Run each product as often as it occurs, one after the other, and nothing else.

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
        part["seconds"] += time_product(product, count, dtype, device)
        part["flop"] += count * product.flop
    return {key: sum(part[key] for part in parts.values()) for key in ("seconds", "flop")} | {"parts": parts}


def time_product(product: Product, count: int, dtype: torch.dtype, device: torch.device) -> float:
    """Give the seconds of a product that is run ``count`` times, warmed up, with its operands in the caches."""
    left = _operand(product.batch, product.rows, product.inner, product.layout == "tn", dtype, device)
    right = _operand(product.batch, product.inner, product.columns, product.layout == "nt", dtype, device)
    multiply = torch.mm if product.batch == 1 else torch.bmm
    multiply(left, right)  # warms up
    synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        multiply(left, right)
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for what a card has yet to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _operand(batch: int, rows: int, columns: int, transposed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    stored = (columns, rows) if transposed else (rows, columns)
    made = torch.randn(stored if batch == 1 else (batch, *stored), dtype=dtype, device=device)
    return made.transpose(-2, -1) if transposed else made
