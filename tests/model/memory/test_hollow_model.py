"""A model without numbers is the one that a run would train: the same tensors, layers and bytes."""

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from transformers import LlamaConfig

from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.build import fuse, meta_base, meta_copy, put_adapters
from qlora_lightning.model.layers.lora import runs_fused
from qlora_lightning.model.memory.plan import STORAGES, count_trained, name_storage, read_base
from qlora_lightning.model.summary import bytes_by_dtype
from qlora_lightning.support.errors import UserError

ROOT = Path(__file__).parents[3]


def build(config, quantization="nf4", folder=None, fast=True, **options):
    base = meta_base(config, torch.bfloat16, quantization)
    options = options if folder else {"rank": 4, **options}
    model = put_adapters(base, folder, **options).to("meta")
    fuse(model, fast)
    return model


def describe(model):
    """What memory depends on: tensors that train, and parts by name."""
    trained = {name: (tensor.shape, tensor.dtype) for name, tensor in trainable_tensors(model).items()}
    parts = {name: (type(module), runs_fused(module)) for name, module in model.named_modules()}
    return trained, {name: part for name, part in parts.items() if "lora_" not in name}, read_base(model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantization": "int8", "fast": False},
        {"quantization": "none"},
        {"dropout": 0.1, "layers": "last:1"},
        {"target_modules": ["q_proj", "down_proj"], "lora_options": {"use_dora": True}},
        {"lora_options": {"trainable_token_indices": [3], "rank_pattern": {"q_proj": 6}}},
    ],
    ids=str,
)
def test_a_hollow_model_is_the_model_without_its_numbers(tiny_base, options):
    module = QLoRAModule(str(tiny_base), rank=4, compute_dtype="bf16", **options)
    module.configure_model()
    module.model.train()
    module.choose_layers()
    trained, parts, base = describe(module.model)
    for name, (kind, fused) in parts.items():
        parts[name] = (bnb.nn.Linear8bitLt if issubclass(kind, bnb.nn.Linear8bitLt) else kind), fused
    copied = meta_copy(module.model, torch.bfloat16, module.quantization, module.fast)
    for hollow in (build(tiny_base, **options), copied):
        assert all(parameter.is_meta for parameter in hollow.parameters())
        assert describe(hollow) == (trained, parts, base)


@pytest.mark.parametrize(
    ("config", "options", "fused"),
    [
        ({}, {}, True),
        ({"hidden_act": "swish"}, {}, True),
        ({"hidden_act": "gelu"}, {}, False),
        ({"attention_dropout": 0.1}, {}, False),
        ({}, {"dropout": 0.1}, False),
    ],
)
def test_layers_are_fused_where_they_would_be(config, options, fused):
    model = build(small(**config), **options)
    assert [runs_fused(layer) for layer in model.get_base_model().model.layers] == [fused] * 2


def test_an_adapter_folder_brings_its_own_shape_and_what_fit_refuses_is_refused(tiny_base, tmp_path):
    made = QLoRAModule(str(tiny_base), rank=3, target_modules="attention", compute_dtype="bf16")
    made.configure_model()
    made.save_adapter(tmp_path / "adapter")
    assert count_trained(build(tiny_base, folder=tmp_path / "adapter")) == count_trained(made.model)
    with pytest.raises(UserError, match=r"model\.rank is 4, but the adapter in .* has 3"):
        build(tiny_base, folder=tmp_path / "adapter", rank=4)
    with pytest.raises(UserError, match=r"model\.lora_options"):
        build(tiny_base, lora_options={"init_lora_weights": "pissa"})


# ---- bytes -----------------------------------------------------------------------------------------------------------


def small(**settings):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 100, "num_hidden_layers": 2, "tie_word_embeddings": False}
    return LlamaConfig(**{**shape, **settings})


def test_llama_has_its_known_sizes():
    config = json.loads((ROOT / "configs/shapes/llama-3.1-8b/config.json").read_text())
    model = build(LlamaConfig(**config), rank=16)
    base = read_base(model)
    assert base.parameters == 8_030_261_248  # as its model card says: 8.03 billion
    rounded = {storage: round(base.count_bytes(storage) / 1e9, 2) for storage in STORAGES}
    assert rounded == {"fp32": 32.12, "bf16": 16.06, "int8": 9.09, "nf4": 6.03, "nf4, double quantized": 5.70}
    assert count_trained(model) == 41_943_040  # rank 16 on all linears, as PEFT prints it


@pytest.mark.parametrize(
    ("quantization", "double_quant", "storage"),
    [
        ("nf4", True, "nf4, double quantized"),
        ("fp4", False, "nf4"),
        ("int8", True, "int8"),
        ("none", True, "bf16"),
    ],
)
def test_a_loaded_base_takes_as_much_as_planned(tiny_base, quantization, double_quant, storage):
    loaded = load_base(str(tiny_base), quantization=quantization, double_quant=double_quant, cache=False).model
    found = sum(bytes_by_dtype(loaded).values())
    if quantization == "int8":  # whose scales are no parameters
        found += sum(m.weight.SCB.nbytes for m in loaded.modules() if isinstance(m, bnb.nn.Linear8bitLt))
    assert name_storage(quantization, double_quant, number_bytes=2) == storage
    assert name_storage("none", double_quant, number_bytes=4) == "fp32"
    assert read_base(meta_base(tiny_base)).count_bytes(storage) == found
