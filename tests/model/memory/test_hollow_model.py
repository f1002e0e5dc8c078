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
from qlora_lightning.model.memory.base_shape import STORAGES, name_storage, read_base
from qlora_lightning.model.memory.plan import count_trained
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


def test_only_the_rotary_tables_of_a_meta_base_are_real(tiny_base):
    model = meta_base(tiny_base)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # tied


def test_an_adapter_folder_brings_its_own_shape(tiny_base, tmp_path):
    made = QLoRAModule(str(tiny_base), rank=3, target_modules="attention", compute_dtype="bf16")
    made.configure_model()
    made.save_adapter(tmp_path / "adapter")
    assert count_trained(build(tiny_base, folder=tmp_path / "adapter")) == count_trained(made.model)
    with pytest.raises(UserError, match=r"model\.rank is 4, but the adapter in .* has 3"):
        build(tiny_base, folder=tmp_path / "adapter", rank=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa"}, r"model\.lora_options"),
        ({"modules_to_save": ["q_proj"]}, "integers have no gradient"),
    ],
)
def test_options_that_fit_refuses_are_refused(tiny_base, options, words):
    with pytest.raises(UserError, match=words):
        build(tiny_base, lora_options=options)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def small(**settings):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 100, "num_hidden_layers": 2, "tie_word_embeddings": False}
    return LlamaConfig(**{**shape, **settings})


def test_a_small_base_is_counted_by_hand():
    model = build(small(), rank=8)
    # queries and output 64 × 64, keys and values 32 × 64, gate, up and down 128 × 64
    linears, rows = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64), 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    others = 5 * 64 + 2 * 100 * 64  # norms, embedding, head
    base = read_base(model)
    assert base.parameters == linears + others
    # scales: one for 64 numbers; of a weight of 4,096 numbers 64, which share one outer scale
    assert {storage: base.count_bytes(storage) for storage in STORAGES} == {
        "fp32": 4 * (linears + others),
        "bf16": 2 * (linears + others),
        "int8": linears + 4 * rows + 2 * others,
        "nf4": linears // 2 + 4 * linears // 64 + 2 * others,
        "nf4, double quantized": linears // 2 + linears // 64 + 4 * 2 * 7 + 2 * others,
    }
    assert count_trained(model) == 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))  # A 8 × in, B out × 8
    assert read_base(build(small(tie_word_embeddings=True))).parameters == linears + others - 100 * 64
    assert [read_base(build(small(), quantization)) for quantization in ("int8", "none")] == [base] * 2


def test_llama_has_its_known_sizes():
    model, smaller = (
        build(LlamaConfig(**json.loads((ROOT / "configs/shapes" / name / "config.json").read_text())), rank=16)
        for name in ("llama-3.1-8b", "llama-3.2-1b")
    )
    base = read_base(model)
    assert base.parameters == 8_030_261_248  # as its model card says: 8.03 billion
    rounded = {storage: round(base.count_bytes(storage) / 1e9, 2) for storage in STORAGES}
    assert rounded == {"fp32": 32.12, "bf16": 16.06, "int8": 9.09, "nf4": 6.03, "nf4, double quantized": 5.70}
    assert count_trained(model) == 41_943_040  # rank 16 on all linears, as PEFT prints it
    assert read_base(smaller).parameters == 1_235_814_400


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_loaded_base_takes_as_much_as_planned(tiny_base, quantization, double_quant):
    loaded = load_base(str(tiny_base), quantization=quantization, double_quant=double_quant, cache=False).model
    found = sum(bytes_by_dtype(loaded).values())
    if quantization == "int8":  # whose scales are no parameters
        found += sum(m.weight.SCB.nbytes for m in loaded.modules() if isinstance(m, bnb.nn.Linear8bitLt))
    storage = name_storage(quantization, double_quant, number_bytes=2)
    assert read_base(meta_base(tiny_base)).count_bytes(storage) == found


def test_a_base_that_is_not_quantized_has_the_dtype_of_the_products():
    assert [name_storage("none", True, number_bytes) for number_bytes in (2, 4)] == ["bf16", "fp32"]
    assert [name_storage("fp4", double, 2) for double in (False, True)] == ["nf4", "nf4, double quantized"]
