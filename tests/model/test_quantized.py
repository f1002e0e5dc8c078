import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lightning.model.base_model import load_base
from qlora_lightning.support.errors import UserError

QUANTIZED = ["nf4", "fp4", "int8"]
LINEARS = 2 * 7  # layers × linears


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
            found[f"{name}.scales"] = (
                module.state.SCB.clone() if module.weight.SCB is None else module.weight.SCB.clone()
            )
    return found


def are_bit_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def forward(model):
    ids = torch.randint(5, 40_000, (1, 12), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def read_folders(monkeypatch):
    """The folders that models are loaded from, one after another."""
    folders = []
    original = AutoModelForCausalLM.from_pretrained

    def spy(folder, **settings):
        folders.append(folder)
        return original(folder, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    return folders


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_linear_of_the_layers_is_stored_in_4_bits(tiny_base, quantization, double_quant):
    model = load(tiny_base, quantization, double_quant=double_quant)
    assert len(linears(model)) == LINEARS
    for linear in linears(model):
        assert type(linear) is bnb.nn.Linear4bit
        assert linear.weight.numel() == linear.in_features * linear.out_features // 2  # two numbers in a byte
        state = linear.weight.quant_state
        assert (state.quant_type, state.nested, linear.compute_dtype) == (quantization, double_quant, torch.bfloat16)


def test_every_linear_of_the_layers_is_stored_in_8_bits(tiny_base):
    model = load(tiny_base, "int8")
    assert [m.weight.dtype for m in linears(model)] == [torch.int8] * LINEARS
    assert all(isinstance(m, bnb.nn.Linear8bitLt) for m in linears(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_quantization_all_is_in_the_compute_dtype(tiny_base, dtype):
    model = load(tiny_base, "none", compute_dtype=dtype)
    assert all(type(m) is nn.Linear for m in linears(model))
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("quantization", [*QUANTIZED, "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_is_frozen_and_embedding_norms_and_head_are_in_the_compute_dtype(tiny_base, quantization, dtype):
    model = load(tiny_base, quantization, compute_dtype=dtype)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.get_input_embeddings().weight.dtype == dtype
    assert model.model.norm.weight.dtype == dtype
    assert model.lm_head.weight is model.get_input_embeddings().weight  # tied


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_a_second_start_reads_the_cache_and_gets_the_same_bits(tiny_base, own_cache, read_folders, quantization):
    first = load(tiny_base, quantization)
    (entry,) = (folder for folder in (own_cache / "quantized").iterdir() if folder.is_dir())
    assert read_folders == [tiny_base, entry]
    second = load(tiny_base, quantization)
    assert read_folders == [tiny_base, entry, entry]
    assert are_bit_equal(tensors(first), tensors(second))


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_without_cache_nothing_is_kept_and_the_bits_are_the_same(tiny_base, own_cache, quantization):
    direct = load(tiny_base, quantization, cache=False)
    assert not (own_cache / "quantized").exists()
    assert are_bit_equal(tensors(direct), tensors(load(tiny_base, quantization)))


def test_what_decides_the_bits_decides_the_cache_entry(tiny_base, own_cache):
    for settings in ({}, {"double_quant": False}, {"compute_dtype": torch.float32}, {}):
        load(tiny_base, "nf4", **settings)
    assert len(list((own_cache / "quantized").glob("*/entry.json"))) == 3


def test_a_base_whose_config_was_edited_computes_what_it_says_now(tiny_base, tmp_path, own_cache):
    shutil.copytree(tiny_base, base := tmp_path / "base")
    before = forward(load(base, "nf4"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu", "attention_dropout": 0.5}))
    edited = load(base, "nf4")
    assert edited.config.attention_dropout == 0.5
    assert not torch.equal(forward(edited.eval()), before)


@pytest.mark.parametrize("quantization", [*QUANTIZED, "none"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_base_is_bit_equal_after_evaluation_and_saving_and_still_passes_gradients(
    tiny_base, quantization, double_quant
):
    model = load(tiny_base, quantization, double_quant=double_quant)
    before = tensors(model)
    model.eval()
    with torch.no_grad():
        forward(model)
    model.state_dict()
    model.train()
    assert are_bit_equal(before, tensors(model))

    linear = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    linear(x).float().sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("quantization", [*QUANTIZED, "none"])
def test_evaluation_computes_what_training_does(tiny_base, quantization):
    model = load(tiny_base, quantization)
    with torch.no_grad():
        assert torch.equal(forward(model.eval()), forward(model.train()))


def test_int8_layers_stay_in_training_mode(tiny_base):
    model = load(tiny_base, "int8").eval()
    assert not model.training
    assert all(linear.training for linear in linears(model))


def store_quantized(folder, place, **settings):
    settings = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(place)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


def test_a_folder_stored_quantized_loads_as_it_is(tiny_base, tmp_path, own_cache):
    store_quantized(tiny_base, tmp_path / "stored", **NF4)
    model = load(tmp_path / "stored", "nf4")
    assert are_bit_equal(tensors(model), tensors(load(tiny_base, "nf4", double_quant=False, cache=False)))
    assert not (own_cache / "quantized").exists()


@pytest.mark.parametrize("quantization", ["int8", "fp4", "none"])
def test_a_folder_stored_quantized_is_not_quantized_otherwise(tiny_base, tmp_path, quantization):
    store_quantized(tiny_base, tmp_path / "stored", **NF4)
    sentence = f"stored quantized as nf4, but model.quantization is {quantization}: set model.quantization: nf4"
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / "stored", quantization)


def test_a_folder_stored_quantized_computes_in_the_dtype_asked_for(tiny_base, tmp_path):
    store_quantized(tiny_base, tmp_path / "stored", **NF4)
    model = load(tmp_path / "stored", "nf4", compute_dtype=torch.float32)
    assert {linear.compute_dtype for linear in linears(model)} == {torch.float32}


def test_a_linear_that_is_left_unquantized_stops_the_start(tiny_base, tmp_path):
    store_quantized(tiny_base, tmp_path / "stored", **NF4, llm_int8_skip_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="not whole: it left out q_proj"):
        load(tmp_path / "stored", "nf4")


def test_the_record_names_source_and_fingerprint(tiny_base):
    nf4, plain = load_base(str(tiny_base)), load_base(str(tiny_base), quantization="none")
    assert nf4.quantization == "nf4"
    assert nf4.source.folder == tiny_base
    assert nf4.loadable_name == str(tiny_base)
    assert nf4.fingerprint == plain.fingerprint


@pytest.mark.parametrize("name", ["no/such/folder", "package:no_such_package"])
def test_a_base_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=r"no_such_package|no such file or folder"):
        load_base(name)
