"""The ceiling of a step: how long torch takes for its matrix products alone.

Counted are the products that a LLaMA with adapters on all linears cannot do without. What an implementation computes
again is not among them, except the second forward pass of gradient checkpointing, nor is a token that no label needs.
Attention is in tiles of 64 queries of all samples of that length, with the keys up to there: a little more than the
causal half.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qlora_lightning.model.load.machine import choose_compute_dtype
from qlora_lightning.model.step.layout import IGNORED, find_computed
from tests.benchmarks.communication import linears

_TILE = 64  # queries: smaller products are slower, larger ones hold more scores behind the diagonal


class Product(NamedTuple):
    """One shape of matrix product: ``(rows, inner)`` times ``(inner, columns)``, ``batch`` of them at once.

    ``layout`` says which operand is transposed in memory: none (``nn``), the right (``nt``), the left (``tn``).
    """

    rows: int
    inner: int
    columns: int
    layout: str
    batch: int = 1


def measure_ceiling(module: Any, batch: Any, checkpointing: bool) -> float:
    """Run each product of a ``QLoRAModule``'s step on a flat batch, and nothing else; return the seconds."""
    ids, labels = (batch[name][0].cpu().numpy() for name in ("input_ids", "labels"))
    samples, labelled = (np.split(each, batch["cu_seqlens"].tolist()[1:-1]) for each in (ids, labels != IGNORED))
    computed = find_computed(samples, [each[1:] for each in labelled])
    config, rank = module.causal_lm.config.to_dict(), module.adapter_options["rank"]
    products = count_products(
        config, rank, computed.lengths, computed.shared, int((labels != IGNORED).sum()), checkpointing
    )
    dtype = choose_compute_dtype(module.compute_dtype, module.device)
    return sum(_time_product(product, count, dtype, module.device) for product, count in products.items())


def count_products(
    config: dict[str, Any],
    rank: int,
    attended: Sequence[int],
    shared: Sequence[int],
    labelled: int,
    checkpointing: bool,
) -> Counter[Product]:
    """Count the products of a training step.

    Backward has none for the base's weights, and none below the first layer's adapters. Gradient checkpointing runs the
    forward pass of each layer again, up to its last linear, whose result backward does not need.

    Args:
        config: Of the model, as a dict.
        rank: Of the adapters.
        attended: Tokens of each sample that attention has.
        shared: How many of these are computed with another sample.
        labelled: Labelled tokens.
        checkpointing: Whether the step runs with gradient checkpointing.
    """
    tokens, shapes, layers = sum(attended) - sum(shared), linears(config), config["num_hidden_layers"]
    forward, down, backward, entry = Counter[Product](), Counter[Product](), Counter[Product](), Counter[Product]()
    for number, (inputs, outputs) in enumerate(shapes):
        of_linear = Counter(
            [
                Product(tokens, inputs, outputs, "nt"),  # x Wᵀ
                Product(tokens, inputs, rank, "nt"),  # low = x Aᵀ
                Product(tokens, rank, outputs, "nt"),  # low Bᵀ
            ]
        )
        forward += of_linear
        down = of_linear  # the last one is it
        backward.update(
            [
                Product(tokens, outputs, rank, "nn"),  # grad_low = grad B
                Product(rank, tokens, outputs, "tn"),  # grad_Bᵀ = lowᵀ grad
                Product(rank, tokens, inputs, "tn"),  # grad_A = grad_lowᵀ x
            ]
        )
        grad_x = Counter([Product(tokens, outputs, inputs, "nn"), Product(tokens, rank, inputs, "nn")])
        backward += grad_x
        if number < 3:  # q, k and v, below which the first layer needs no gradient
            entry += grad_x
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    for first in range(0, max(attended), _TILE):
        keys, rows = first + _TILE, _TILE * heads // kv_heads
        spans = zip(shared, attended, strict=True)
        matrices = kv_heads * sum(begin < keys and length > first for begin, length in spans)
        scores, mixed = Product(rows, width, keys, "nt", matrices), Product(rows, keys, width, "nn", matrices)
        by_key = Product(keys, rows, width, "tn", matrices)
        forward.update([scores, mixed])  # Q Kᵀ and P V
        backward.update([scores, by_key, mixed, by_key])  # grad_P, grad_V, grad_Q, grad_K
    layer = forward + backward + (forward - down if checkpointing else Counter())
    products = Counter({product: layers * count for product, count in layer.items()}) - entry
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    products.update([Product(labelled, hidden, vocabulary, "nt"), Product(labelled, vocabulary, hidden, "nn")])
    return products


def _time_product(product: Product, count: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds of a product that is run ``count`` times, warmed up, with its operands in the caches."""

    def make_operand(rows: int, columns: int, transposed: bool) -> Tensor:
        stored = (columns, rows) if transposed else (rows, columns)
        operand = torch.randn(stored if product.batch == 1 else (product.batch, *stored), dtype=dtype, device=device)
        return operand.transpose(-2, -1) if transposed else operand

    left = make_operand(product.rows, product.inner, product.layout == "tn")
    right = make_operand(product.inner, product.columns, product.layout == "nt")
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
