"""The frozen base: stored as asked, the same bits from the cache and again, in a dtype that the machine has."""

import re

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_lightning import UserError, load_base
from qlora_lightning.cli import main
from qlora_lightning.model.layers.lora import FusedInt8Linear
from qlora_lightning.model.load import machine
from qlora_lightning.model.load.machine import choose_compute_dtype, explain_dtype
from tests.adapters import make_adapter
from tests.equality import base_tensors, same
from tests.errors import rejects
from tests.random_base import save_random_llama
from tests.steps import distance, loss_and_gradients, make_module

QUANTIZED = ["nf4", "fp4", "int8"]


def load(folder, quantization, **settings):
    return load_base(str(folder), quantization=quantization, **settings).model


def linears(model):
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name]


STORED = [("nf4", torch.float32, False), *((name, torch.bfloat16, True) for name in ("fp4", "int8", "none"))]


@pytest.mark.parametrize(("quantization", "dtype", "double_quant"), STORED)
def test_linears_are_stored_as_asked_and_all_else_in_the_compute_dtype(tiny_base, quantization, dtype, double_quant):
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
    assert same(base_tensors(direct), base_tensors(first))
    assert same(base_tensors(first), base_tensors(second))


def test_a_folder_stored_quantized_loads_as_it_is_in_the_dtype_asked_for(tiny_base, tmp_path, cache):
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    options = {"quantization_config": BitsAndBytesConfig(**nf4), "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(tiny_base, **options).save_pretrained(tmp_path / "stored")
    model, other = (load(tmp_path / "stored", "nf4", compute_dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert {linear.compute_dtype for linear in linears(other)} == {torch.float32}
    assert not (cache / "quantized").exists()
    assert same(base_tensors(model), base_tensors(load(tiny_base, "nf4", double_quant=False, cache=False)))


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_f"), reason="others compute rightly with it")
@pytest.mark.parametrize("quantization", ["nf4", pytest.param("fp4", marks=pytest.mark.slow)])
def test_a_width_that_a_cpu_computes_wrongly_is_rejected_and_merged_rightly(tiny_base, tmp_path, quantization):
    base = tmp_path / "base"
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(base)
    save_random_llama(base, torch.float32, hidden_size=64, intermediate_size=96)
    with rejects("base.width", "rows of 96 weights, as in model.layers.0.mlp.down_proj"):
        make_module(base, quantization=quantization)
    make_adapter(tmp_path / "adapter", base, std=0.0, quantization="none")
    identity = tmp_path / "adapter" / "qlora_lightning.json"
    identity.write_text(identity.read_text().replace('"none"', f'"{quantization}"'))  # as of a GPU
    assert main(["merge", "--adapter", f"{tmp_path}/adapter", "--out", f"{tmp_path}/out", "--rows", "0"]) == 0
    name = "model.layers.0.mlp.down_proj.weight"
    merged, exact = (load_file(folder / "model.safetensors")[name].float() for folder in (tmp_path / "out", base))
    assert 0.05 < distance(merged, exact) < 0.13  # the error of 4 bits


@pytest.mark.parametrize(
    ("name", "device", "hardware", "dtype", "words"),
    [
        ("auto", "cpu", {}, torch.bfloat16, None),
        ("auto", "cpu", {"capabilities": {"avx512_bf16": False}}, torch.float32, "no bf16: .* in float32"),
        ("bf16", "cpu", {"capabilities": {}}, torch.bfloat16, "only emulates bfloat16"),
        ("auto", "cuda", {}, torch.bfloat16, None),
        ("auto", "cuda", {"capability": (7, 5)}, torch.float16, "products are computed in float16"),
        ("auto of gemma2", "cuda", {"capability": (7, 5)}, torch.float32, "computed in float32"),
        ("bf16", "cuda", {"capability": (7, 5)}, UserError, "which this GPU only emulates"),
    ],
)
def test_dtypes_are_chosen_by_the_hardware_and_slow_ones_announced(monkeypatch, name, device, hardware, dtype, words):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: hardware.get("capabilities", {"avx512_bf16": True}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: hardware.get("capability", (8, 0)))
    device, (name, _, model_type) = torch.device(device), name.partition(" of ")
    if dtype is UserError:
        with rejects("model.compute_dtype", words):
            choose_compute_dtype(name, device)
        return
    assert choose_compute_dtype(name, device, model_type) == dtype
    found = explain_dtype(device, str(dtype).removeprefix("torch."))
    assert found is None if words is None else re.search(words, found)


def test_the_limit_of_a_container_counts_without_the_files_that_it_has_cached(tmp_path, monkeypatch):
    for name, content in {"max": "1000", "current": "600", "stat": "anon 500\ninactive_file 100"}.items():
        (tmp_path / f"memory.{name}").write_text(f"{content}\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    assert machine.free_bytes(torch.device("cpu")) == 500


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_int8_linears_give_the_bits_of_bitsandbytes(tiny_base, dtype):
    module = make_module(tiny_base, quantization="int8", compute_dtype=dtype, dropout=1e-9)  # PEFT's layers around them
    loss, gradients = loss_and_gradients(module)
    ours = [each for each in module.modules() if isinstance(each, FusedInt8Linear)]
    assert len(ours) == 2 * 7  # layers × linears
    for linear in ours:
        linear.fallback_reason = "as bitsandbytes wrote it"
    plain_loss, plain_gradients = loss_and_gradients(module)
    assert loss == plain_loss
    assert torch.equal(gradients, plain_gradients)


def test_layers_of_an_int8_base_run_fused_as_those_of_peft(tiny_base):
    fused, plain = (make_module(tiny_base, quantization="int8", fast=fast) for fast in (True, False))
    assert not any(fused.choose_layers().layers.values())
    (loss, gradients), (plain_loss, plain_gradients) = map(loss_and_gradients, (fused, plain))
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert distance(gradients, plain_gradients) < 1e-5


def test_an_int8_linear_without_outliers_takes_states_beyond_float16(tiny_base):
    module = make_module(tiny_base, quantization="int8", compute_dtype="bf16")
    linear = next(each for each in module.modules() if isinstance(each, FusedInt8Linear))
    linear.state.threshold, linear.training = 0.0, False  # as on a GPU, where inputs are cast to float16
    x = torch.zeros(2, linear.in_features, dtype=torch.bfloat16)
    x[0, 0], x[1, 1] = 100_000.0, 1.0
    outputs = linear(x)
    assert outputs.isfinite().all()
    weight = linear.weight[:, 0] * linear.state.SCB / 127
    torch.testing.assert_close(outputs[0].float(), 65_280 * weight, rtol=0.02, atol=1e-3)
