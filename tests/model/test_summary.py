import pytest
import torch

from qlora_lightning.model.adapters.lora import add_adapters
from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.summary import adapter_table, bytes_by_dtype, count_parameters, describe_sizes

EMBEDDING = 49_152 * 64  # tied: counted once
LINEARS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # layers × (q and o, k and v, the three of the MLP)
NORMS = 5 * 64
ADAPTER = 2 * 8 * 1024  # layers × rank × (in + out) of the seven linears


def load(folder, quantization="nf4", **settings):
    return load_base(str(folder), quantization=quantization, **settings).model


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_quantized_weight_counts_as_the_numbers_it_stands_for(tiny_base, quantization):
    model = load(tiny_base, quantization)
    assert count_parameters(model) == (0, EMBEDDING + LINEARS + NORMS)
    assert count_parameters(add_adapters(model)) == (ADAPTER, EMBEDDING + LINEARS + NORMS + ADAPTER)


@pytest.mark.parametrize(
    ("double_quant", "scales"),
    # a scale for 64 weights: in 4 bytes, or in one byte and for each linear 4 bytes more (all have up to 256 scales)
    [(False, 4 * LINEARS // 64), (True, LINEARS // 64 + 4 * 14)],
)
def test_bytes_of_4_bit_weights_include_their_scales(tiny_base, double_quant, scales):
    model = load(tiny_base, double_quant=double_quant)
    assert bytes_by_dtype(model) == {"bfloat16": 2 * (EMBEDDING + NORMS), "nf4": LINEARS // 2 + scales}


def test_bytes_by_dtype_of_int8_and_of_plain_weights(tiny_base):
    assert bytes_by_dtype(load(tiny_base, "none")) == {"bfloat16": 2 * (EMBEDDING + LINEARS + NORMS)}
    model = add_adapters(load(tiny_base, "int8"))
    assert bytes_by_dtype(model) == {"bfloat16": 2 * (EMBEDDING + NORMS), "int8": LINEARS, "float32": 4 * ADAPTER}


def rows_of(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_the_table_lists_adapted_modules_by_kind(tiny_base):
    table = adapter_table(add_adapters(load(tiny_base), target_modules=["q_proj", "v_proj", "down_proj"]))
    assert rows_of(table) == [
        ("q_proj", "2", "8 × 64", "64 × 8", "2,048"),
        ("v_proj", "2", "8 × 64", "32 × 8", "1,536"),
        ("down_proj", "2", "8 × 128", "64 × 8", "3,072"),
    ]


def test_modules_with_other_shapes_have_a_row_of_their_own(tiny_base):
    options = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}}
    table = adapter_table(add_adapters(load(tiny_base), target_modules=["q_proj"], lora_options=options))
    assert rows_of(table) == [("q_proj", "1", "2 × 64", "64 × 2", "256"), ("q_proj", "1", "8 × 64", "64 × 8", "1,024")]


def test_what_trains_beside_the_adapters_has_a_row(tiny_base):
    options = {"trainable_token_indices": [5, 6]}
    table = adapter_table(add_adapters(load(tiny_base), target_modules=["q_proj"], lora_options=options))
    assert rows_of(table)[-1] == ("trained beside", "", "", "", "128")


def test_the_line_says_what_trains_and_what_lies_in_memory(tiny_base):
    line = describe_sizes(add_adapters(load(tiny_base, "none", compute_dtype=torch.float32)))
    total = EMBEDDING + LINEARS + NORMS + ADAPTER  # 3,236,160
    assert line == f"16,384 of {total:,} parameters train (0.51%); in memory: float32 13 MB"
