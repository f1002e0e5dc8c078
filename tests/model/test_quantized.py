"""The frozen base: stored as asked, the same bits from the cache and again, one function in eval and in train."""

import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lightning.model.load.base_model import load_base
from qlora_lightning.support.errors import UserError
from tests.equality import same

QUANTIZED = ["nf4", "fp4", "int8"]


def load(folder, quantization, **settings):
    return load_base(str(folder), quantization=quantization, **settings).model


def linears(model):
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name]


def tensors(model):
    """Every weight as it is stored, and the scales beside it."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            found[f"{name}.absmax"] = state.absmax.clone()
            found[f"{name}.dense"] = bnb.functional.dequantize_4bit(module.weight.data, state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            found[f"{name}.scales"] = scales.clone()
    return found


def forward(model):
    ids = torch.randint(5, 40_000, (1, 12), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("quantization", "dtype", "double_quant"),
    [
        ("nf4", torch.float32, False),
        ("fp4", torch.bfloat16, True),
        ("int8", torch.bfloat16, True),
        ("none", torch.bfloat16, True),
    ],
)
def test_linears_are_stored_as_asked_and_all_else_is_frozen_in_the_compute_dtype(
    tiny_base, quantization, dtype, double_quant
):
    model = load(tiny_base, quantization, compute_dtype=dtype, double_quant=double_quant)
    kinds = {"none": nn.Linear, "int8": bnb.nn.Linear8bitLt}
    assert len(linears(model)) == 2 * 7  # layers × linears
    for linear in linears(model):
        assert isinstance(linear, kinds.get(quantization, bnb.nn.Linear4bit))
        if quantization in kinds:
            assert linear.weight.dtype == (torch.int8 if quantization == "int8" else dtype)
        else:
            state = linear.weight.quant_state
            assert (state.quant_type, state.nested, linear.compute_dtype) == (quantization, double_quant, dtype)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.get_input_embeddings().weight.dtype == model.model.norm.weight.dtype == dtype
    assert model.lm_head.weight is model.get_input_embeddings().weight  # tied


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_with_and_without_cache_and_at_a_second_start_the_bits_are_the_same(tiny_base, cache, caplog, quantization):
    caplog.set_level("INFO", logger="qlora_lightning")
    direct = load(tiny_base, quantization, cache=False)
    first, second = load(tiny_base, quantization), load(tiny_base, quantization)
    assert caplog.text.count("Quantizing") == 1
    load(tiny_base, quantization, compute_dtype=torch.float32)
    assert caplog.text.count("Quantizing") == 2
    assert same(tensors(direct), tensors(first))
    assert same(tensors(first), tensors(second))


def test_a_base_whose_config_was_edited_computes_what_it_says_now(tiny_base, tmp_path, cache):
    shutil.copytree(tiny_base, base := tmp_path / "base")
    before = forward(load(base, "nf4"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu", "attention_dropout": 0.5}))
    edited = load(base, "nf4")
    assert edited.config.attention_dropout == 0.5
    assert not torch.equal(forward(edited.eval()), before)


def store_quantized(folder, place, **settings):
    settings = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(place)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


def test_a_folder_stored_quantized_loads_as_it_is_in_the_dtype_asked_for(tiny_base, tmp_path, cache):
    store_quantized(tiny_base, tmp_path / "stored", **NF4)
    model, other = (load(tmp_path / "stored", "nf4", compute_dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert {linear.compute_dtype for linear in linears(other)} == {torch.float32}
    assert not (cache / "quantized").exists()
    assert same(tensors(model), tensors(load(tiny_base, "nf4", double_quant=False, cache=False)))


@pytest.mark.parametrize(
    ("left_out", "quantization", "words"),
    [
        (["lm_head"], "int8", "stored quantized as nf4, but .* is int8: set that to nf4"),
        (["q_proj", "lm_head"], "nf4", "stored quantized without q_proj"),
    ],
)
def test_a_folder_stored_otherwise_than_asked_is_refused(tiny_base, tmp_path, left_out, quantization, words):
    store_quantized(tiny_base, tmp_path / "stored", **NF4, llm_int8_skip_modules=left_out)
    with pytest.raises(UserError, match=words):
        load(tmp_path / "stored", quantization)


def test_a_whole_validation_leaves_frozen_layers_as_they_are(tiny_base):
    """bitsandbytes 0.50 would repack 4-bit weights in place, and int8 layers would compute another function."""
    ids = {"input_ids": torch.arange(3, 11)[None]}
    for quantization in ("nf4", "int8"):
        model = load(tiny_base, quantization, compute_dtype=torch.bfloat16)
        before, trained = tensors(model), model.train()(**ids).logits
        with torch.no_grad():
            assert torch.equal(model.eval()(**ids).logits, trained)
        assert same(tensors(model.train()), before)
