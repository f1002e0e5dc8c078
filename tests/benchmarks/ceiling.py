"""The ceiling of a step: how long torch takes for its matrix products alone.

Counted are the products that a LLaMA with LoRA adapters cannot do without. What an implementation computes again is
not among them, except the second forward pass of gradient checkpointing, nor is a token that no label needs. Attention
is in tiles of 64 queries of all samples of that length, with the keys up to there: a little more than the causal half.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qlora_lightning.model.load.machine import choose_compute_dtype
from qlora_lightning.model.step.layout import IGNORED, find_computed

_TILE = 64  # queries: smaller products are slower, larger ones hold more scores behind the diagonal
# The linears of a layer in the order in which they run; those of one line share their input.
_STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class Product(NamedTuple):
    """One shape of matrix product: ``(rows, inner)`` times ``(inner, columns)``.

    Attributes:
        rows: Of the result.
        inner: Summed over.
        columns: Of the result.
        layout: Which operand is transposed in memory: none (``nn``), the right (``nt``), the left (``tn``).
        batch: How many at once.
    """

    rows: int
    inner: int
    columns: int
    layout: Literal["nn", "nt", "tn"]
    batch: int = 1

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.rows * self.inner * self.columns


class BatchShape(NamedTuple):
    """What products of a batch depend on.

    Attributes:
        attended: Tokens of each sample that attention has.
        shared: How many of these are computed with another sample.
        labelled: Labelled tokens.
    """

    attended: Sequence[int]
    shared: Sequence[int]
    labelled: int


def read_shape(batch: Any) -> BatchShape:
    """Read the shape of a flat batch."""
    ids, labels = (batch[name][0].cpu().numpy() for name in ("input_ids", "labels"))
    samples, labelled = (np.split(each, batch["cu_seqlens"].tolist()[1:-1]) for each in (ids, labels != IGNORED))
    computed = find_computed(samples, [each[1:] for each in labelled])
    return BatchShape(computed.lengths, computed.shared, int((labels != IGNORED).sum()))


_Tiles = list[tuple[int, int, int, int]]


def measure_ceiling(module: Any, batch: Any, trains: bool, checkpointing: bool) -> dict[str, float]:
    """Run each product of a batch as often as it occurs, and nothing else.

    Args:
        module: A ``QLoRAModule``.
        batch: A flat batch.
        trains: Whether the batch is trained on, else validated.
        checkpointing: Whether the step runs with gradient checkpointing.

    Returns:
        ``seconds`` and ``flop`` of all products.
    """
    device, dtype = module.device, choose_compute_dtype(module.compute_dtype, module.device)
    products = count_products(module.causal_lm, read_shape(batch), trains, checkpointing)
    seconds = sum(_time_product(product, count, dtype, device) for product, count in products.items())
    return {"seconds": seconds, "flop": sum(count * product.flop for product, count in products.items())}


def count_products(causal_lm: Any, batch: BatchShape, trains: bool, checkpointing: bool = False) -> Counter[Product]:
    """Count the products of a training step or of a validation batch, with or without PEFT's layers in the model.

    Backward has none below the lowest adapter, and none for the base's weights. Gradient checkpointing runs the forward
    pass of the layers from there on again, up to their last linear, whose result backward does not need.
    """
    tokens, head = sum(batch.attended) - sum(batch.shared), causal_lm.get_output_embeddings()
    tiles = list(_find_tiles(causal_lm.config, batch))
    products = Counter([Product(batch.labelled, head.in_features, head.out_features, "nt")])
    flows = False  # whether the gradient of what flows into a linear is needed
    for layer in causal_lm.model.layers:
        linears = {name: layer.get_submodule(name) for stage in _STAGES for name in stage}
        forward = Counter(_attention_forward(tiles))
        for linear in linears.values():
            forward.update(_linear_forward(linear, tokens))
        products += forward
        if not trains:
            continue
        for stage in _STAGES:
            for name in stage:
                products.update(_linear_backward(linears[name], tokens, flows))
            flows = flows or any(_rank(linears[name]) for name in stage)
            if stage == _STAGES[0] and flows:
                products.update(_attention_backward(tiles))
        if checkpointing and flows:
            products += forward - Counter(_linear_forward(linears["mlp.down_proj"], tokens))
    if flows:
        products[Product(batch.labelled, head.out_features, head.in_features, "nn")] += 1
    return products


def _rank(linear: Any) -> int:
    return sum(getattr(linear, "r", {}).values())  # PEFT's layers have a rank for each adapter


def _linear_forward(linear: Any, tokens: int) -> Iterator[Product]:
    inputs, outputs, rank = linear.in_features, linear.out_features, _rank(linear)
    yield Product(tokens, inputs, outputs, "nt")  # x Wᵀ
    if rank:
        yield Product(tokens, inputs, rank, "nt")  # low = x Aᵀ
        yield Product(tokens, rank, outputs, "nt")  # low Bᵀ


def _linear_backward(linear: Any, tokens: int, needs_input: bool) -> Iterator[Product]:
    inputs, outputs, rank = linear.in_features, linear.out_features, _rank(linear)
    if needs_input:
        yield Product(tokens, outputs, inputs, "nn")  # g W
    if rank:
        yield Product(tokens, outputs, rank, "nn")  # of low: g B
        yield Product(rank, tokens, outputs, "tn")  # of B, transposed: lowᵀ g
        yield Product(rank, tokens, inputs, "tn")  # of A: (g B)ᵀ x
        if needs_input:
            yield Product(tokens, rank, inputs, "nn")  # g B A


def _find_tiles(config: Any, batch: BatchShape) -> Iterator[tuple[int, int, int, int]]:
    """Yield matrices in each product of a tile, their rows, the keys that these see, and the width of a head."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.head_dim or config.hidden_size // heads
    for first in range(0, max(batch.attended), _TILE):
        end = first + _TILE
        spans = zip(batch.shared, batch.attended, strict=True)
        samples = sum(begin < end and length > first for begin, length in spans)
        yield samples * kv_heads, _TILE * heads // kv_heads, end, width


def _attention_forward(tiles: _Tiles) -> Iterator[Product]:
    for matrices, rows, keys, width in tiles:
        yield Product(rows, width, keys, "nt", matrices)  # Q Kᵀ
        yield Product(rows, keys, width, "nn", matrices)  # P V


def _attention_backward(tiles: _Tiles) -> Iterator[Product]:
    for matrices, rows, keys, width in tiles:
        yield Product(rows, width, keys, "nt", matrices)  # of P: g Vᵀ
        yield Product(keys, rows, width, "tn", matrices)  # of V: Pᵀ g
        yield Product(rows, keys, width, "nn", matrices)  # of Q: dS K
        yield Product(keys, rows, width, "tn", matrices)  # of K: dSᵀ Q


def _time_product(product: Product, count: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds of a product that is run ``count`` times, warmed up, with its operands in the caches."""

    def make_operand(rows: int, columns: int, transposed: bool) -> Tensor:
        stored = (columns, rows) if transposed else (rows, columns)
        made = torch.randn(stored if product.batch == 1 else (product.batch, *stored), dtype=dtype, device=device)
        return made.transpose(-2, -1) if transposed else made

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
