"""What is adapted, what trains, and how many bytes are in which dtype."""

import pytest

from qlora_lightning.model.adapters.lora import add_adapters
from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.summary import adapter_table, bytes_by_dtype, count_parameters, describe_sizes

EMBEDDING = 49_152 * 64  # tied: counted once
LINEARS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # layers × (q and o, k and v, the three of the MLP)
NORMS = 5 * 64
BASE = EMBEDDING + LINEARS + NORMS
ADAPTER = 2 * 8 * 1024  # layers × rank × (in + out) of the seven linears
# a scale for 64 weights: in 4 bytes, or in one byte and for each linear 4 bytes more (all have up to 256 scales)
SCALES, DOUBLE_SCALES = 4 * LINEARS // 64, LINEARS // 64 + 4 * 14


def load(folder, quantization="nf4", **settings):
    return load_base(str(folder), quantization=quantization, **settings).model


@pytest.mark.parametrize(
    ("quantization", "double_quant", "sizes"),
    [
        ("nf4", True, {"bfloat16": 2 * (EMBEDDING + NORMS), "nf4": LINEARS // 2 + DOUBLE_SCALES}),
        ("nf4", False, {"bfloat16": 2 * (EMBEDDING + NORMS), "nf4": LINEARS // 2 + SCALES}),
        ("int8", True, {"bfloat16": 2 * (EMBEDDING + NORMS), "int8": LINEARS}),
        ("none", True, {"bfloat16": 2 * BASE}),
    ],
)
def test_quantized_weights_count_as_the_numbers_they_stand_for_and_their_bytes_with_scales(
    tiny_base, quantization, double_quant, sizes
):
    model = load(tiny_base, quantization, double_quant=double_quant)
    assert count_parameters(model) == (0, BASE)
    assert bytes_by_dtype(model) == sizes
    adapted = add_adapters(model)
    assert count_parameters(adapted) == (ADAPTER, BASE + ADAPTER)
    assert bytes_by_dtype(adapted) == {**sizes, "float32": 4 * ADAPTER}
    assert describe_sizes(adapted).startswith(f"16,384 of {BASE + ADAPTER:,} parameters train (0.51%); in memory: bfl")


def test_the_table_lists_adapted_modules_by_kind_and_shape_and_what_trains_beside(tiny_base):
    options = {"rank_pattern": {"layers.0.self_attn.v_proj": 2}, "trainable_token_indices": [5, 6]}
    targets = ["q_proj", "v_proj", "down_proj"]
    table = adapter_table(add_adapters(load(tiny_base), target_modules=targets, lora_options=options))
    assert sorted(zip(*(column.cells for column in table.columns), strict=True)) == [
        ("down_proj", "2", "8 × 128", "64 × 8", "3,072"),
        ("q_proj", "2", "8 × 64", "64 × 8", "2,048"),
        ("trained beside", "", "", "", "128"),
        ("v_proj", "1", "2 × 64", "32 × 2", "192"),
        ("v_proj", "1", "8 × 64", "32 × 8", "768"),
    ]
