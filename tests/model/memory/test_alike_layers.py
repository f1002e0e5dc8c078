import pytest
import torch
from transformers import LlamaConfig

from qlora_lightning.model.build import build_skeleton
from qlora_lightning.model.memory.shapes import are_alike, deepen, read_model, shorten

SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50, "num_attention_heads": 4}
BASE = {**SMALL, "num_key_value_heads": 2, "num_hidden_layers": 5}


def read(config, quantization="nf4", fast=True, dtype=torch.bfloat16, **options):
    settings = {"compute_dtype": dtype, "quantization": quantization, "fast": fast, "adapter": None}
    return read_model(build_skeleton(config, adapter_options=options, **settings), dtype.itemsize)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ({}, {"rank": 4}),
        ({"tie_word_embeddings": True}, {"target_modules": "attention"}),
        ({"attention_bias": True, "mlp_bias": True}, {"target_modules": ["q_proj", "down_proj"]}),
        ({"attention_bias": True}, {"quantization": "int8", "target_modules": "mlp", "dropout": 0.1}),
        ({}, {"quantization": "none", "fast": False, "dtype": torch.float32}),
        ({}, {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}),
    ],
    ids=str,
)
def test_two_layers_tell_of_all_where_they_are_alike(base, options):
    config = LlamaConfig(**BASE, **base)
    assert are_alike(config, None, options)
    one, two, whole = (read(shorten(config, layers), **options) for layers in (1, 2, 5))
    assert deepen(one, two, 5) == whole
    assert config.num_hidden_layers == 5
    assert len(whole.layers) == 5


def test_what_trains_beside_and_is_the_same_in_each_layer_is_counted_in_each():
    options = {"rank": 2, "lora_options": {"use_dora": True, "modules_to_save": ["input_layernorm"]}}
    one, two, whole = (read(shorten(LlamaConfig(**BASE), layers), **options) for layers in (1, 2, 5))
    deep = deepen(one, two, 5)
    assert sorted(deep.beside) == sorted(whole.beside)
    assert len(deep.beside) == 5 * (7 + 1)  # a magnitude for each linear, and the norm
    assert (deep.layers, deep.base) == (whole.layers, whole.base)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": "last:2"},
        {"layers": [0]},
        {"target_modules": ["layers.3.q_proj"]},
        {"target_modules": r".*\.3\..*"},
        {"lora_options": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}}},
    ],
    ids=str,
)
def test_what_may_set_layers_apart_is_not_alike(options):
    assert not are_alike(LlamaConfig(**BASE), None, options)


def test_an_adapter_folder_and_layers_of_several_types_are_not_alike():
    assert not are_alike(LlamaConfig(**BASE), "runs/a/adapter", {})
    assert not are_alike(LlamaConfig(**BASE, layer_types=["full_attention"] * 5), None, {})
    assert not are_alike(LlamaConfig(**BASE, per_layer_config={1: {"intermediate_size": 32}}), None, {})
