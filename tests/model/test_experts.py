"""Experts of mixtures in 4 bits: read one weight at a time, right whatever the routing, and adapted as PEFT does."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_lightning import QLoRAModule, load_base
from qlora_lightning.model.activation_checkpointing import enable_activation_checkpointing
from qlora_lightning.model.layers.experts import ADAPTS_EXPERTS, experts_of
from tests import families
from tests.benchmarks.one_batch import MemoryWatch
from tests.equality import same
from tests.errors import rejects
from tests.rows import change_json
from tests.steps import assert_same_step, distance, loss_and_gradients, make_batch, make_module, trainable_tensors

PT = {"format": "pt"}
pytestmark = pytest.mark.skipif(not ADAPTS_EXPERTS, reason="PEFT before 0.20 opens no adapters of mixtures")


def edit_tensors(folder, edit):
    """Change the tensors of a base, and give its folder."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, PT)
    return folder


def plain_step(module, base, folder, batch):
    """A step of plain transformers and PEFT on a module's weights, dequantized."""
    module.save_adapter(folder)
    return families.plain_step(families.plain_model(base, folder, module.causal_lm), batch)


@pytest.mark.parametrize(("per_token", "width"), [(1, 64), (2, 96)])  # rows of 96 weights share blocks of 64
def test_experts_without_tokens_and_all_tokens_in_one(per_token, width, tmp_path):
    def route_evenly(tensors):  # equal scores choose the same experts for each token
        for name in tensors:
            tensors[name] *= not name.endswith(".mlp.gate.weight")

    base = families.save_random(
        tmp_path / "base", "qwen3_moe", num_experts_per_tok=per_token, moe_intermediate_size=width
    )
    module, batch = make_module(edit_tensors(base, route_evenly)), make_batch(families.LENGTHS)
    step, expected = loss_and_gradients(module, batch), plain_step(module, base, tmp_path / "adapter", batch)
    assert abs(step[0] / expected[0] - 1) <= 1e-5
    assert distance(step[1], expected[1]) <= 1e-4


PATTERNS = {"rank_pattern": {"experts.down_proj": 3, "gate_proj": 2}, "alpha_pattern": {"down_proj": 30}}
EXPERTS_OF = [("glm4_moe", True)]
MORE_EXPERTS = [("gpt_oss", True), ("qwen2_moe", False), ("qwen3_moe", True), ("glm4_moe", False)]
EXPERTS_OF += [pytest.param(*each, marks=pytest.mark.slow) for each in MORE_EXPERTS]


@pytest.mark.parametrize(("model_type", "target_experts"), EXPERTS_OF)
def test_adapters_on_and_beside_experts_are_plain_pefts_byte_for_byte(model_type, target_experts, tmp_path, cache):
    base, batch = families.save_random(tmp_path / "base", model_type), make_batch((12, 5))
    options = {"target_experts": target_experts}
    if model_type == "glm4_moe":  # gate_proj and down_proj are beside the experts, and PEFT moves adapters to these
        options["lora_options"] = PATTERNS if target_experts else PATTERNS | {"rank_pattern": {"gate_proj": 2}}
    module = make_module(base, **options)
    module.save_adapter(tmp_path / "first")
    dequantized = families.plain_model(base, tmp_path / "first", module.causal_lm)
    step, expected = loss_and_gradients(module, batch), families.plain_step(dequantized, batch)
    assert abs(step[0] / expected[0] - 1) <= 1e-5
    tensors = trainable_tensors(module.model)
    assert list(tensors) == list(trainable_tensors(dequantized))
    sizes = [tensor.numel() for tensor in tensors.values()]
    for name, *gradients in zip(tensors, step[1].split(sizes), expected[1].split(sizes), strict=True):
        assert distance(*gradients) <= 1e-4, name
    again = make_module(base, adapter=str(tmp_path / "first"))
    again.save_adapter(tmp_path / "again")
    plain = families.plain_model(base, tmp_path / "first")
    plain.save_pretrained(tmp_path / "plain")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("first", "again", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert same(load_file(files[0]), load_file(files[2]))
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("first", "again")]
    assert configs[0] == configs[1]
    carriers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in load_file(files[0])}
    modules = AutoModelForCausalLM.from_pretrained(base).named_modules()
    linears = {name for name, module in modules if isinstance(module, nn.Linear) and name != "lm_head"}
    experts = {name.removesuffix(".base_layer") for name in carriers - linears}
    assert linears <= carriers
    assert len(experts) == (len(experts_of(again.causal_lm)) if target_experts else 0)
    again.add_adapter("second", tmp_path / "plain")
    assert_same_step(loss_and_gradients(again, batch), step)
    again.model.set_adapter("second")
    assert_same_step(loss_and_gradients(again, batch), step)
    if target_experts:  # PEFT takes the ends of names
        change_json(tmp_path / "plain" / "adapter_config.json", target_parameters=["gate_up_proj", "down_proj"])
        by_ends = make_module(base, adapter=str(tmp_path / "plain"))
        assert_same_step(loss_and_gradients(by_ends, batch), step)
    again.model.set_adapter("default")
    enable_activation_checkpointing(again.causal_lm)
    assert_same_step(loss_and_gradients(again, batch), step)
    dense = QLoRAModule(str(base), adapter=str(tmp_path / "first"), quantization="none", compute_dtype="fp32")
    with rejects("model.quantization", "nf4", "none"):
        dense.configure_model()
    (tmp_path / "first" / "qlora_lightning.json").unlink()
    dense.configure_model()
    assert families.error_of_tokens(dense, plain, batch) <= 2e-5


@pytest.mark.parametrize("target_modules", ["mlp", ["shared_experts.down_proj"]], ids=str)
def test_mlps_beside_experts_alone_carry_adapters_and_plain_peft_opens_them(target_modules, tmp_path):
    base, batch = families.save_random(tmp_path / "base", "glm4_moe"), make_batch((12, 5))
    module = make_module(base, target_modules=target_modules, quantization="none")
    module.save_adapter(tmp_path / "adapter")
    plain = families.plain_model(base, tmp_path / "adapter")
    assert [*trainable_tensors(module.model)] == [*trainable_tensors(plain)]
    assert families.error_of_tokens(module, plain, batch) <= 2e-5
    for option in ({"lora_dropout": 0.1}, {"use_dora": True}):  # as an older PEFT wrote; this one does not open it
        adapter = shutil.copytree(tmp_path / "adapter", tmp_path / next(iter(option)))
        names = {"target_modules": ["gate_proj", "up_proj", "down_proj"], "target_parameters": None}
        change_json(adapter / "adapter_config.json", **names, **option)
        with rejects("model.target_modules", "next to the experts", next(iter(option)).removeprefix("lora_")):
            make_module(base, adapter=str(adapter), quantization="none")


@pytest.mark.parametrize("model_type", ["zaya", "hunyuan_v1_moe", "llama4_text"])  # their routers have linears
def test_no_preset_trains_a_router(model_type, tmp_path):
    module = make_module(families.save_random(tmp_path, model_type), quantization="none")
    assert not [name for name in trainable_tensors(module.model) if ".router." in name or ".gate." in name]
    assert loss_and_gradients(module, make_batch((12, 5)))[1].isfinite().all()


def test_experts_stored_in_mxfp4_are_those_of_16_bits(tmp_path, cache):
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

    def store(tensors):  # (experts, out, in / 32, 16) bytes, of which each has two values, and powers of two
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, width, out = tensors.pop(name).shape
            blocks = torch.randint(256, (experts, out, width // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, blocks.shape[:3], dtype=torch.uint8)
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
            pairs = torch.stack((values[(blocks & 15).long()], values[(blocks >> 4).long()]), dim=-1).flatten(3)
            weight = pairs * 2.0 ** (scales.float() - 127)[..., None]
            tensors[name] = weight.flatten(2).transpose(1, 2).contiguous()

    def replace(tensors):
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            del tensors[name]
        tensors |= packed

    packed = {}
    dense = edit_tensors(families.save_random(tmp_path / "dense", "gpt_oss"), store)
    published = edit_tensors(families.save_random(tmp_path / "published", "gpt_oss"), replace)
    mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    change_json(published / "config.json", quantization_config=mxfp4)
    steps = [loss_and_gradients(make_module(base), make_batch((30, 5))) for base in (dense, published, published)]
    for step in steps[1:]:
        assert_same_step(step, steps[0])
    with rejects("model.quantization", "MXFP4"):
        load_base(str(published), quantization="none")


@pytest.mark.parametrize(
    ("settings", "key", "fact"),
    [
        ({"num_experts_per_tok": 99}, "num_experts_per_tok", "99"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok", "is 0"),
        ({"moe_intermediate_size": 128}, "base.config", "config.json"),  # files have 64
    ],
)
def test_a_config_that_does_not_describe_its_experts_is_rejected(settings, key, fact, tmp_path, cache):
    base = families.save_random(tmp_path / "base", "qwen3_moe")
    change_json(base / "config.json", **settings)
    with rejects(key, fact, str(base)):
        load_base(str(base))


@pytest.mark.slow
def test_a_base_is_never_in_16_bits_as_a_whole(tmp_path):
    sizes = {"num_hidden_layers": 8, "hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 16}
    base = families.save_random(tmp_path / "base", "qwen3_moe", **sizes)
    before, watch = MemoryWatch().stop(), MemoryWatch(interval=0.001)
    load_base(str(base), cache=False, compute_dtype=torch.float32)
    assert watch.stop() - before < (base / "model.safetensors").stat().st_size / 2
