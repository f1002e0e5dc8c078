"""Bases in FP8: what is trained is the dequantized checkpoint bit for bit, one weight of which is dense at a time."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from qlora_lightning import load_base
from qlora_lightning.cli import main
from tests import families
from tests.adapters import load_by_card, make_adapter, make_run
from tests.equality import base_tensors, same
from tests.errors import rejects
from tests.processes import run_python
from tests.random_base import save_family
from tests.rows import change_json

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
TENSORS = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FLOAT = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}


def compressed(**weights):
    return FLOAT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | weights}}, "ignore": []}


CHANNELS, GRID = compressed(), compressed(strategy="block", block_structure=[128, 128])
WIDE = {"hidden_size": 192, "intermediate_size": 320}  # no multiples of 128
LAYOUTS = {
    "blocks": ("llama", BLOCKS, WIDE),
    "tensors": ("qwen3", TENSORS, {}),
    "experts": ("qwen3_moe", BLOCKS, {"hidden_size": 192, "moe_intermediate_size": 192}),
    "experts in one": ("gpt_oss", BLOCKS, {"hidden_size": 192, "intermediate_size": 192}),
    "scales of experts": ("gpt_oss", TENSORS, {}),
    "channels": ("llama", CHANNELS, WIDE),
    "compressed blocks": ("qwen3_moe", GRID, WIDE),
    "a wrapper": ("mistral3", BLOCKS, {}),
}


def store(folder, settings):
    """Store the weights of a base's layers in FP8; return the folder and a copy with the values that these have."""
    dense = shutil.copytree(folder, folder.with_name(f"{folder.name}-dense"))
    stored, values = load_file(folder / "model.safetensors"), {}
    suffix = "_scale_inv" if settings["quant_method"] == "fp8" else "_scale"
    for name, weight in list(stored.items()):
        if weight.dim() < 2 or ".layers." not in name or "vision" in name:
            continue
        *experts, rows, columns = weight.shape
        if settings is TENSORS:
            scales = torch.rand((*experts, 1, 1) if experts else ())
            stored[f"{name.removesuffix('.weight')}.activation_scale"] = torch.tensor(2.0)
        elif settings is CHANNELS:
            scales = torch.rand(*experts, rows, 1)
            stored[f"{name.rpartition('.')[0]}.input_scale"] = torch.tensor(2.0)
        else:
            scales = torch.rand(*experts, math.ceil(rows / 128), math.ceil(columns / 128))
        scales = ((scales + 0.5) / 300).bfloat16() if settings is CHANNELS else (scales + 0.5) / 300
        factors = scales.float()
        if settings not in (TENSORS, CHANNELS):
            factors = factors.repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :columns]
        stored[name] = (weight / factors).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[f"{name}{suffix}"] = scales
        values[name] = stored[name].float() * factors
    assert values
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(stored_of(dense) | values, dense / "model.safetensors", {"format": "pt"})
    change_json(folder / "config.json", quantization_config=settings)
    return folder, dense


def test_scales_are_found_by_the_name_that_autofp8_gives_them(tmp_path):
    base, dense = save(tmp_path, "tensors")
    stored = {name.replace("_scale_inv", "_scale"): tensor for name, tensor in stored_of(base).items()}
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    loaded, expected = (load_base(str(folder), quantization="none").model for folder in (base, dense))
    assert same(base_tensors(loaded), base_tensors(expected))


def stored_of(folder):
    return load_file(folder / "model.safetensors")


def save(folder, layout):
    model_type, settings, sizes = LAYOUTS[layout]
    write = families.save_wrapper if model_type in families.WRAPPERS else families.save_random
    return store(write(folder / "base", model_type, **sizes), settings)


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(5, 45).view(1, -1), use_cache=False).logits


BF16, FP32 = torch.bfloat16, torch.float32
CASES = [("blocks", "nf4", BF16), ("tensors", "int8", FP32), ("experts", "nf4", FP32), ("channels", "none", BF16)]
MORE_CASES = [(layout, "nf4", dtype) for layout in LAYOUTS for dtype in (BF16, FP32)]
MORE_CASES += [("blocks", kind, dtype) for kind in ("fp4", "int8", "none") for dtype in (BF16, FP32)]
MORE_CASES += [("experts", "none", BF16), ("tensors", "int8", BF16), ("a wrapper", "none", BF16)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES if case not in CASES]


@pytest.mark.parametrize(("layout", "quantization", "dtype"), CASES)
def test_a_base_in_fp8_is_its_dequantized_checkpoint_bit_for_bit(layout, quantization, dtype, tmp_path, cache):
    options = {"quantization": quantization, "compute_dtype": dtype}
    loaded, dense = (load_base(str(folder), **options) for folder in save(tmp_path, layout))
    assert same(base_tensors(loaded.model), base_tensors(dense.model))
    assert torch.equal(logits(loaded.model), logits(dense.model))
    assert loaded.identity["stored_as"] == LAYOUTS[layout][1]["quant_method"]
    assert "stored_as" not in dense.identity
    assert loaded.identity["fingerprint"] != dense.identity["fingerprint"]
    assert same(base_tensors(load_base(str(tmp_path / "base"), **options).model), base_tensors(loaded.model))


def test_whole_blocks_are_dequantized_as_transformers_does(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
    base, _ = store(families.save_random(tmp_path / "base", "llama", **sizes), BLOCKS)
    config = FineGrainedFP8Config(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    ours = load_base(str(base), quantization="none").model
    assert same(dict(ours.state_dict()), dict(plain.state_dict()))


LOAD = """
import sys
import torch
from qlora_lightning import load_base
from tests.benchmarks.one_batch import MemoryWatch

load_base(sys.argv[2], cache=False, compute_dtype=torch.float32)  # imports what the other needs
before, watch = MemoryWatch().stop(), MemoryWatch(interval=0.001)
load_base(sys.argv[1], cache=False, compute_dtype=torch.float32)
print(watch.stop() - before)
"""


@pytest.mark.slow
def test_one_weight_is_dense_at_a_time(tmp_path):
    sizes = {"num_hidden_layers": 8, "hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 16}
    base, dense = store(families.save_random(tmp_path / "base", "qwen3_moe", **sizes), BLOCKS)
    small, _ = store(families.save_random(tmp_path / "small", "qwen3_moe"), BLOCKS)
    taken = int(run_python("-c", LOAD, base, small, cwd=Path(__file__).parents[2]).stdout.splitlines()[-1])
    size = (dense / "model.safetensors").stat().st_size  # in fp32
    # packed, the pages of the file, and a layer's largest weight twice; a dense base in 16 bits takes half of it more
    assert taken < size / 8 + size / 4 + 2 * 16 * 1024 * 256 * 4


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_merge_writes_16_bits_and_says_so(quantization, tiny_base, tmp_path, cache, capsys):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 512}
    base, dense = store(save_family(tmp_path / "base", "llama", tiny_base, **sizes), BLOCKS)
    make_run(tmp_path / "run", base, quantization=quantization)
    assert main(["merge", "--adapter", f"{tmp_path}/run", "--out", f"{tmp_path}/merged"]) == 0
    assert "is published in fp8. The merged model is written in bfloat16" in " ".join(capsys.readouterr().out.split())
    merged = stored_of(tmp_path / "merged")
    assert merged.keys() == stored_of(dense).keys()
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["check"]["merged"]["kl"] < 1e-3


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # PEFT asks for it
def test_the_card_of_an_adapter_loads_the_base_in_16_bits(tiny_base, tmp_path, cache):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    base, dense = store(save_family(tmp_path / "base", "llama", tiny_base, **sizes), BLOCKS)
    make_adapter(tmp_path / "adapter", base, quantization="none")
    assert json.loads((tmp_path / "adapter" / "qlora_lightning.json").read_text())["stored_as"] == "fp8"
    plain = families.plain_model(dense, tmp_path / "adapter")
    torch.testing.assert_close(logits(load_by_card(tmp_path / "adapter")[0]), logits(plain), rtol=1e-5, atol=1e-5)


def test_a_plan_counts_the_files_of_a_base(tmp_path, monkeypatch, capsys):
    base, _ = save(tmp_path, "blocks")
    arguments = ["plan", "--model.base", str(base), "--data.train", "none.jsonl", "--json", "plan.json", "--force"]
    monkeypatch.chdir(tmp_path)
    size = (base / "model.safetensors").stat().st_size
    for expected in (size, 12345):
        main(arguments)
        figures = json.loads((tmp_path / "plan.json").read_text())["base"]
        assert (figures["stored_as"], figures["stored_bytes"]) == ("fp8", expected)
        assert "(fp8)" in capsys.readouterr().out
        (base / "model.safetensors").unlink(missing_ok=True)  # as before a download
        index = {"metadata": {"total_size": 12345}, "weight_map": {"lm_head.weight": "model-1.safetensors"}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))


NVFP4 = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
NVFP4 |= {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group"}}}}
REFUSED = [
    (NVFP4, "compressed-tensors nvfp4-pack-quantized"),
    (CHANNELS | {"transform_config": {"config_groups": {"u": {}}}}, "compressed-tensors float-quantized"),
    (compressed(strategy="group", group_size=32), "compressed-tensors float-quantized"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4"),
    ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ({"quant_method": "fp8", "expert_dtype": "fp4"}, "fp8"),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "fp8"),
    ({"quant_method": "compressed-tensors", "config_groups": [3]}, "compressed-tensors"),
]


@pytest.mark.parametrize(("settings", "kind"), REFUSED, ids=[kind for _, kind in REFUSED])
def test_other_layouts_are_refused_by_name_with_what_to_choose(settings, kind, tmp_path):
    base = families.save_random(tmp_path / "base", "llama")
    change_json(base / "config.json", quantization_config=settings)
    with rejects("model.quantization", f"as {kind} (not by", "use the same model in FP8", "16 bits"):
        load_base(str(base))


def test_files_that_are_not_stored_as_their_config_says_are_rejected(tmp_path):
    base, _ = save(tmp_path, "blocks")
    change_json(base / "config.json", quantization_config=BLOCKS | {"weight_block_size": [64, 64]})
    with rejects("base.tensors", "model.layers.0.", "not stored as its config.json says"):
        load_base(str(base), cache=False)
    change_json(base / "config.json", quantization_config=BLOCKS)
    stored = stored_of(base)
    del stored["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    with rejects("base.tensors", "model.layers.1.mlp.up_proj.weight"):
        load_base(str(base), cache=False)
    stored = stored_of(save(tmp_path / "int8", "blocks")[0])
    stored["model.layers.1.mlp.up_proj.weight"] = stored["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    with rejects("base.tensors", "model.layers.1.mlp.up_proj.weight", "torch.int8"):
        load_base(str(base), cache=False)
