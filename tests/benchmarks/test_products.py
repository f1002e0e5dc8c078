"""Products counted by hand for a LLaMA of two layers: 4 wide, 2 heads of 2 over 1, 6 inner, 10 words, rank 1."""

from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lightning.model.adapters.lora import add_adapters
from qlora_lightning.model.batch import BatchShape
from tests.benchmarks.ceiling import measure_ceiling
from tests.benchmarks.products import Product, Shape, forward_products, shape_of, step_products

BATCH = BatchShape(lengths=(3, 2), labelled=2)
# Of one layer: the weights of q, k, v, o, gate, up and down, and their inputs and outputs, once each.
WEIGHTS = 16 + 8 + 8 + 16 + 24 + 24 + 24
ENDS = 8 + 6 + 6 + 8 + 10 + 10 + 10
BY_TOKEN = 2 * 5  # a multiplication and an addition for each of five tokens
TILES = 2 * 2 * 2 * (64 * 64 + 64 * 64)  # one product of attention: two heads, two wide; each sample fills a tile
HEAD = 2 * 2 * 4 * 10  # two labelled tokens


def shape_with_adapters(layers: str | list[int] = "all") -> Shape:
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return shape_of(add_adapters(LlamaForCausalLM(config), rank=1, layers=layers).get_base_model())


def flop_by_part(products: Counter[Product]) -> dict[str, int]:
    flop: Counter[str] = Counter()
    for product, count in products.items():
        flop[product.part] += count * product.flop
    return dict(flop)


def test_step_has_the_products_counted_by_hand() -> None:
    assert flop_by_part(step_products(shape_with_adapters(), BATCH, gradient_checkpointing=False)) == {
        "base": 2 * BY_TOKEN * WEIGHTS,
        "base backward": BY_TOKEN * (2 * WEIGHTS - 32),  # the first layer's q, k and v pass nothing on
        "adapters": BY_TOKEN * (2 * 3 * ENDS - 3 * 4),  # forward once, backward twice
        "attention": 2 * (2 + 4) * TILES,
        "head": 2 * HEAD,
    }


def test_nothing_flows_below_the_lowest_adapter() -> None:
    shape = shape_with_adapters(layers=[1])

    assert flop_by_part(step_products(shape, BATCH, gradient_checkpointing=True)) == {
        "base": 2 * BY_TOKEN * WEIGHTS,
        "base backward": BY_TOKEN * (WEIGHTS - 32),
        "base again": BY_TOKEN * (WEIGHTS - 24),  # nothing needs what down gives
        "adapters again": BY_TOKEN * (ENDS - 10),
        "attention again": 2 * TILES,
        "adapters": BY_TOKEN * (3 * ENDS - 3 * 4),
        "attention": (2 * 2 + 4) * TILES,
        "head": 2 * HEAD,
    }


def test_validation_has_the_forward_products_only() -> None:
    assert flop_by_part(forward_products(shape_with_adapters(), BATCH)) == {
        "base": 2 * BY_TOKEN * WEIGHTS,
        "adapters": 2 * BY_TOKEN * ENDS,
        "attention": 2 * 2 * TILES,
        "head": HEAD,
    }


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", ["nn", "nt", "tn"])
def test_ceiling_is_of_every_product_as_often_as_it_occurs(batch: int, layout: str) -> None:
    product = Product("head", 2, 3, 4, layout, batch)

    found = measure_ceiling(Counter({product: 5}), torch.float32, torch.device("cpu"))

    assert found["flop"] == 5 * batch * 2 * (2 * 3 * 4)
    assert found["parts"] == {"head": {"seconds": found["seconds"], "flop": found["flop"]}}
    assert found["seconds"] > 0
