"""The matrix products of a training step: what a LLaMA with LoRA adapters cannot do without.

Nothing that an implementation computes again belongs to them, and no token that no label needs. Attention has tiles of
64 queries of all samples that reach so far, with the keys up to there: somewhat more than up to the diagonal.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from peft.tuners.lora import LoraLayer

from qlora_lightning.model.batch import BatchShape

TILE = 64  # queries: smaller products are slower, larger ones hold more scores behind the diagonal
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
        part: of the step that it belongs to.
        rows: of the result.
        inner: summed over.
        columns: of the result.
        layout: which operand lies transposed in memory: none (``nn``), the right (``nt``), the left (``tn``).
        batch: how many at once.
    """

    part: str
    rows: int
    inner: int
    columns: int
    layout: Literal["nn", "nt", "tn"]
    batch: int = 1

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.rows * self.inner * self.columns


class Linear(NamedTuple):
    """A linear: numbers of inputs, of outputs, and the rank of its adapter, 0 without one."""

    inputs: int
    outputs: int
    rank: int


@dataclass(frozen=True)
class Shape:
    """What of a model decides its products.

    Attributes:
        layers: the linears of each by name.
        heads: of the queries.
        kv_heads: of the keys and values.
        head_dim: width of a head.
        head: the language model's head.
    """

    layers: Sequence[Mapping[str, Linear]]
    heads: int
    kv_heads: int
    head_dim: int
    head: Linear


def shape_of(causal_lm: Any) -> Shape:
    """Read the shape of a LLaMA of transformers, with or without PEFT's layers in it."""
    names = [name for stage in _STAGES for name in stage]
    config = causal_lm.config
    layers = [{name: _linear(layer.get_submodule(name)) for name in names} for layer in causal_lm.model.layers]
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, config.num_key_value_heads
    return Shape(layers, *heads, head_dim, _linear(causal_lm.get_output_embeddings()))


def forward_products(shape: Shape, batch: BatchShape) -> Counter[Product]:
    """Count the products of a forward pass; the head sees labelled tokens only."""
    products: Counter[Product] = Counter()
    for layer in shape.layers:
        for linear in layer.values():
            products.update(_linear_forward(linear, batch.computed))
        products.update(_attention_forward(shape, batch))
    products[Product("head", batch.labelled, shape.head.inputs, shape.head.outputs, "nt")] += 1
    return products


def backward_products(shape: Shape, batch: BatchShape) -> Counter[Product]:
    """Count the products of a backward pass: none below the lowest adapter, none for the base's weights."""
    products: Counter[Product] = Counter()
    tokens, flows = batch.computed, False  # whether the gradient of what flows in is wanted
    for layer in shape.layers:
        for stage in _STAGES:
            for name in stage:
                products.update(_linear_backward(layer[name], tokens, flows))
            flows = flows or any(layer[name].rank for name in stage)
            if stage == _STAGES[0] and flows:
                products.update(_attention_backward(shape, batch))
    if flows:
        products[Product("head", batch.labelled, shape.head.outputs, shape.head.inputs, "nn")] += 1
    return products


def second_forward_products(shape: Shape, batch: BatchShape) -> Counter[Product]:
    """Count the products that gradient checkpointing runs again: of the lowest layer with adapters and above.

    Backward needs nothing of what a layer's last linear gives.
    """
    lowest = next(at for at, layer in enumerate(shape.layers) if any(linear.rank for linear in layer.values()))
    *needed, _ = (name for stage in _STAGES for name in stage)
    products: Counter[Product] = Counter()
    for layer in shape.layers[lowest:]:
        for name in needed:
            products.update(_linear_forward(layer[name], batch.computed))
        products.update(_attention_forward(shape, batch))
    return Counter({product._replace(part=f"{product.part} again"): count for product, count in products.items()})


def step_products(shape: Shape, batch: BatchShape, gradient_checkpointing: bool) -> Counter[Product]:
    """Count the products of a training step."""
    products = forward_products(shape, batch) + backward_products(shape, batch)
    return products + second_forward_products(shape, batch) if gradient_checkpointing else products


def _linear(layer: Any) -> Linear:
    adapters = layer.r if isinstance(layer, LoraLayer) else {}
    return Linear(layer.in_features, layer.out_features, sum(adapters.values()))


def _linear_forward(linear: Linear, tokens: int) -> Iterator[Product]:
    inputs, outputs, rank = linear
    yield Product("base", tokens, inputs, outputs, "nt")  # x Wᵀ
    if rank:
        yield Product("adapters", tokens, inputs, rank, "nt")  # low = x Aᵀ
        yield Product("adapters", tokens, rank, outputs, "nt")  # low Bᵀ


def _linear_backward(linear: Linear, tokens: int, wants_input: bool) -> Iterator[Product]:
    inputs, outputs, rank = linear
    if wants_input:
        yield Product("base backward", tokens, outputs, inputs, "nn")  # g W
    if rank:
        yield Product("adapters", tokens, outputs, rank, "nn")  # of low: g B
        yield Product("adapters", rank, tokens, outputs, "tn")  # of B, transposed: lowᵀ g
        yield Product("adapters", rank, tokens, inputs, "tn")  # of A: (g B)ᵀ x
        if wants_input:
            yield Product("adapters", tokens, rank, inputs, "nn")  # g B A


def _attention_forward(shape: Shape, batch: BatchShape) -> Iterator[Product]:
    for matrices, rows, seen in _attention_shapes(shape, batch):
        yield Product("attention", rows, shape.head_dim, seen, "nt", matrices)  # Q Kᵀ
        yield Product("attention", rows, seen, shape.head_dim, "nn", matrices)  # P V


def _attention_backward(shape: Shape, batch: BatchShape) -> Iterator[Product]:
    for matrices, rows, seen in _attention_shapes(shape, batch):
        yield Product("attention", rows, shape.head_dim, seen, "nt", matrices)  # of P: g Vᵀ
        yield Product("attention", seen, rows, shape.head_dim, "tn", matrices)  # of V: Pᵀ g
        yield Product("attention", rows, seen, shape.head_dim, "nn", matrices)  # of Q: dS K
        yield Product("attention", seen, rows, shape.head_dim, "tn", matrices)  # of K: dSᵀ Q


def _attention_shapes(shape: Shape, batch: BatchShape) -> Iterator[tuple[int, int, int]]:
    """Give how many matrices go into each product, their rows, and the keys that these see."""
    shared = batch.shared or [0] * len(batch.attended)
    for first in range(0, max(batch.attended), TILE):
        end = first + TILE
        samples = sum(begin < end and length > first for begin, length in zip(shared, batch.attended, strict=True))
        yield samples * shape.kv_heads, TILE * shape.heads // shape.kv_heads, end
