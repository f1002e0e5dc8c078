"""``merge`` as a user runs it: what base and adapter compute, in a folder for transformers and in GGUF files."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from qlora_lightning.cli import main
from qlora_lightning.commands import merge as merge_command
from qlora_lightning.commands import merged_model
from qlora_lightning.commands.merge_check import compare_logits
from qlora_lightning.model.merge import Merge
from qlora_lightning.sources.folders import open_base
from tests.adapters import make_run
from tests.commands.conftest import help_examples
from tests.errors import rejects
from tests.random_base import save_family
from tests.rows import change_json

ADAPTER = "runs/quickstart/adapter"
LINEAR = "model.layers.1.mlp.down_proj"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
UNCHECKED = ("--rows", "0")


@pytest.fixture(scope="module")
def whole(small_base, tmp_path_factory):
    """A run's folder, merged into all that a merge can write; and the model that the adapter was written from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("merge"))
        model = make_run(folder / "runs" / "quickstart", small_base)
        merge("--dtype", "fp32", "--gguf", "f16")
    return folder, model


@pytest.fixture
def merged(whole, monkeypatch):
    """The folder of that merge, as the current one; only read."""
    monkeypatch.chdir(whole[0])
    return whole[0]


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    """The current folder, a fresh one with the run in it."""
    shutil.copytree(whole[0] / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(*arguments, code=0, adapter=ADAPTER, out="merged"):
    assert main(["merge", "--adapter", str(adapter), "--out", str(out), *arguments]) == code


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def paths(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("arguments", help_examples("merge"), ids=" ".join)
def test_the_examples_of_help_run(arguments, folder, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert ("--lora" if "--adapter-gguf" in arguments else "  merged: loss ") in out
    if "q8_0" in arguments:
        tensors = gguf.GGUFReader("runs/quickstart/gguf/gguf/model-q8_0.gguf").tensors
        assert {tensor.tensor_type.name for tensor in tensors} == {"F32", "Q8_0"}


def test_the_merged_folder_is_a_model_for_plain_transformers_and_agrees(merged, whole, small_base):
    model = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(model), logits(whole[1]), rtol=1e-4, atol=1e-4)
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config = json.loads((merged / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    templates = [AutoTokenizer.from_pretrained(each).chat_template for each in ("merged", small_base)]
    assert templates[0] == templates[1]
    stops = json.loads((merged / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert config["eos_token_id"] == stops == model.generation_config.eos_token_id
    check = json.loads((merged / "merged" / "merge.json").read_text())["check"]
    assert check["rows"] == 8
    for name in ("merged", "model-f16.gguf"):
        assert check[name]["kl"] < 1e-6
        assert check[name]["loss"] == pytest.approx(check["base + adapter"]["loss"], abs=1e-4)


def test_a_gguf_file_holds_tokenizer_and_template(merged, small_base):
    reader = gguf.GGUFReader("merged/gguf/model-f16.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (types["output_norm.weight"], types["blk.1.attn_q.weight"]) == ("F32", "F16")
    assert "output.weight" not in types  # tied
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    assert reader.get_field("tokenizer.chat_template").contents() == tokenizer.chat_template
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is False
    again = AutoTokenizer.from_pretrained("merged/gguf", gguf_file="model-f16.gguf")
    text = "<|im_start|>user\nIt's 12:30, I'd say.\n\nGrüße 🙂<|im_end|>"
    assert again(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {"q_proj": 3, "layers.1.*up_proj": 5}}])
def test_an_adapter_as_gguf_changes_a_base_as_the_merge_does(options, small_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", small_base, quantization="none", rank=4, lora_options=options)
    merge("--dtype", "fp32", "--gguf", "f16", *UNCHECKED, adapter="run")
    merge("--adapter-gguf", "f32", adapter="run", out="alone")
    reader, whole_reader = gguf.GGUFReader("alone/adapter-f32.gguf"), gguf.GGUFReader("merged/gguf/model-f16.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    merged, base = ({tensor.name: torch.tensor(tensor.data).float() for tensor in whole_reader.tensors}, {})
    config, stored = json.loads((small_base / "config.json").read_text()), load_file(small_base / "model.safetensors")
    places = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    places |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    for name, weight in stored.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\..*\.(\w+)_proj\.weight", name):
            layer, part = match.groups()
            if part in "qk":  # rotated halves of a head become pairs
                heads = config["num_attention_heads" if part == "q" else "num_key_value_heads"]
                weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            base[f"blk.{layer}.{places[part]}.weight"] = weight
    assert tensors.keys() == {f"{name}.lora_{which}" for name in base for which in "ab"}
    for name, weight in base.items():
        lora_a, lora_b = (tensors[f"{name}.lora_{which}"] for which in "ab")
        change = fields["adapter.lora.alpha"] / lora_b.shape[1] * lora_b @ lora_a  # as llama.cpp adds it
        assert change.abs().max() > 0.01
        torch.testing.assert_close(weight + change, merged[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "lm_head.weight"),
    ],
)
def test_what_llama_cpp_has_no_tensors_for_is_refused_by_name(options, name, small_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", small_base, quantization="none", lora_options=options)
    with rejects("gguf.adapter", name, "with --gguf"):
        merge_command.main(["--adapter", "run", "--out", "alone", "--adapter-gguf", "f16"])
    assert not Path("alone").exists()


@pytest.fixture(scope="module")
def plain_run(small_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter_gguf") / "run"
    make_run(folder, small_base, quantization="none", rank=4)
    return folder


@pytest.fixture
def run(plain_run, tmp_path, monkeypatch):
    """A run that a test may change, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(plain_run, "run")
    return Path("run/adapter")


def write_tensors(adapter, tensors):
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})


def test_an_adapter_in_bf16_is_written_as_its_values_are(run):
    tensors = load_file(run / "adapter_model.safetensors")
    write_tensors(run, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    merge("--adapter-gguf", "f32", adapter="run", out="bf16")
    write_tensors(run, {name: tensor.bfloat16().float() for name, tensor in tensors.items()})
    merge("--adapter-gguf", "f32", adapter="run", out="fp32")
    assert Path("bf16/adapter-f32.gguf").read_bytes() == Path("fp32/adapter-f32.gguf").read_bytes()


A = f"base_model.model.{LINEAR}.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors[A].fill_(float("nan")), ("adapter.nan", LINEAR)),
        (lambda tensors: tensors.pop(A), ("adapter.shapes", LINEAR)),
        (lambda tensors: tensors[A].fill_(1e5), ("gguf.adapter", LINEAR, "beyond f16", "--adapter-gguf f32")),
    ],
    ids=["not finite", "without A", "beyond f16"],
)
def test_an_adapter_that_a_gguf_file_cannot_hold_is_rejected(change, expected, run):
    tensors = load_file(run / "adapter_model.safetensors")
    change(tensors)
    write_tensors(run, tensors)
    with rejects(*expected):
        merge_command.main(["--adapter", "run", "--out", "alone", "--adapter-gguf", "f16"])
    assert not Path("alone").exists()


@pytest.mark.parametrize("alpha", [0, 0.0])
def test_an_alpha_that_llama_cpp_takes_for_none_is_rejected(alpha, run):
    change_json(run / "adapter_config.json", lora_alpha=alpha)
    with rejects("gguf.adapter", "lora_alpha", "is 0", "merge the adapter"):
        merge_command.main(["--adapter", "run", "--out", "alone", "--adapter-gguf", "f16"])


@pytest.mark.parametrize(
    "options", [("--gguf", "f16"), ("--dtype", "fp32"), ("--rows", "3"), ("--data.val", "rows.jsonl")]
)
def test_options_of_merging_beside_an_adapter_as_gguf_are_rejected(options, run, capsys):
    merge("--adapter-gguf", "f16", *options, code=2, adapter="run", out="alone")
    assert "--adapter-gguf merges and checks nothing" in capsys.readouterr().err


def test_an_adapter_of_another_tool_is_added_to_the_original_weights(folder, small_base, capsys):
    (folder / "foreign").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(f"{ADAPTER}/{name}", "foreign")
    merge("--dtype", "fp32", "--data.val", "runs/quickstart/val.jsonl", adapter="foreign")
    assert "does not say how its base was quantized" in capsys.readouterr().out
    before, after = load_file(small_base / "model.safetensors"), load_file("merged/model.safetensors")
    assert before.keys() == after.keys()
    tensors = load_file("foreign/adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{LINEAR}.lora_{each}.weight"] for each in "AB")
    torch.testing.assert_close(after[f"{LINEAR}.weight"], before[f"{LINEAR}.weight"] + 2.0 * b @ a)  # alpha is 2 x rank
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_without_rows_a_merge_is_written_only_unchecked(folder, small_base, capsys):
    """As in a folder that was moved: the base is there, the data are not."""
    config = {"model": {"base": str(small_base)}, "data": {"train": "gone.jsonl", "val": "gone.jsonl"}}
    (folder / "runs/quickstart/config.yaml").write_text(json.dumps(config))
    merge(code=2)
    assert "No rows to check the merge on. data.val: data file gone.jsonl does not exist" in capsys.readouterr().err
    merge(*UNCHECKED)
    assert json.loads((folder / "merged" / "merge.json").read_text())["check"] is None


@pytest.mark.parametrize(
    ("function", "typed", "name"),
    [((Merge, "merge"), [], "merged"), ((gguf.quants, "quantize"), ["--gguf", "f16"], "model-f16.gguf")],
)
def test_a_model_that_disagrees_is_not_kept(folder, capsys, monkeypatch, function, typed, name):
    """What is written is loaded again: a fault in either file is seen."""
    usual = getattr(*function)
    monkeypatch.setattr(*function, lambda *arguments: 2 * usual(*arguments))
    before = paths(folder)
    merge("--rows", "2", *typed, code=2)
    assert f"The merged model is not kept: {name} differs" in capsys.readouterr().err
    assert paths(folder) == before


def test_only_a_merged_model_is_replaced_and_only_by_force(folder, capsys):
    (folder / ".merged.unfinished").mkdir()  # of a merge that was killed
    merge(*UNCHECKED)
    merge(*UNCHECKED, code=2)
    assert "--out merged exists" in capsys.readouterr().err
    merge(*UNCHECKED, "--dtype", "fp16", "--force")
    assert load_file("merged/model.safetensors")["model.norm.weight"].dtype == torch.float16
    assert not (folder / ".merged.unfinished").exists()
    before = paths(folder)
    merge("--force", out="runs/quickstart", code=2)
    assert paths(folder) == before


# ---- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3"))]
)
def test_transformers_reads_the_same_model(model_type, folder, small_base):
    make_run(folder / "run", save_family(folder / "base", model_type, small_base))
    merge("--gguf", "f16", "--dtype", "fp32", adapter="run/adapter")
    place = {"pretrained_model_name_or_path": "merged/gguf", "gguf_file": "model-f16.gguf"}
    config = AutoConfig.from_pretrained(**place)
    written = AutoConfig.from_pretrained("merged")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for name in (*names, "vocab_size", "rms_norm_eps", "rope_parameters"):
        assert getattr(config, name) == pytest.approx(getattr(written, name)), name
    model = AutoModelForCausalLM.from_pretrained(**place, config=written)
    for name, tensor in load_file("merged/model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor.half().float() if tensor.dim() > 1 else tensor), name
    check = json.loads((folder / "merged" / "merge.json").read_text())["check"]
    assert check["model-f16.gguf"]["kl"] < 1e-4


def test_a_file_with_biases_and_llama_3_s_rotary_embeddings_is_the_same_base_again(folder, small_base):
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    sizes = {"hidden_size": 256, "intermediate_size": 128, "max_position_embeddings": 131_072}
    base = save_family(folder / "base", "llama", small_base, rope_parameters=rope, **sizes)
    make_run(folder / "run", base)
    merge("--gguf", "f16", *UNCHECKED, adapter="run/adapter")
    again = AutoModelForCausalLM.from_pretrained(open_base("merged/gguf/model-f16.gguf").folder)
    assert again.config.rope_parameters == rope
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert torch.equal(again.model.rotary_emb.inv_freq, merged.model.rotary_emb.inv_freq)
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize(
    ("key", "fact", "change"),
    [
        ("base.tensors", "self_attn.k_proj.bias", {"blk.0.attn_q.bias": 64}),
        ("base.gguf", "blk.0.attn_q_norm.weight", {"blk.0.attn_q_norm.weight": 16}),
        ("base.gguf", "rope_freqs.weight", {"rope_freqs.weight": 8}),
        ("base.gguf", "llama.rope.scaling (linear, factor 4)", {"llama.rope.scaling.factor": 4.0}),
        ("base.gguf", "llama.rope.scaling (yarn, factor 1)", {"llama.rope.scaling.type": "yarn"}),
    ],
)
def test_a_file_with_more_than_transformers_loads_is_rejected(merged, tmp_path, key, fact, change):
    reader, file = gguf.GGUFReader("merged/gguf/model-f16.gguf"), tmp_path / "more.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, value in change.items():
        if isinstance(value, int):
            writer.add_tensor(name, np.full(value, 8.0, np.float32))
        else:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with rejects(key, fact):
        open_base(str(file))


def test_other_families_and_tokenizers_are_refused_before_the_work(folder, small_base, monkeypatch, capsys):
    make_run(folder / "run", save_family(folder / "base", "phi3", small_base))
    content = json.loads((folder / ADAPTER / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = True  # as Llama 2's
    (folder / ADAPTER / "tokenizer.json").write_text(json.dumps(content))
    # what writes merged weights
    monkeypatch.setattr(merged_model, "save_file", lambda *_: pytest.fail("weights were written"))
    for adapter, words in (("run/adapter", "llama, qwen2, qwen3, not of phi3"), (ADAPTER, "tokenizers of bytes")):
        merge("--gguf", "f16", adapter=adapter, code=2)
        assert words in capsys.readouterr().err
    assert not (folder / "merged").exists()


@pytest.mark.parametrize(("system", "line"), [("Be\nbrief.", 'SYSTEM """Be\nbrief."""\n'), ('"""\nFROM x', "")])
def test_a_tokenizer_of_qwen_is_named_so_and_a_stop_token_is_a_line(folder, system, line):
    file = folder / ADAPTER / "qlora_lightning.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "data": {"settings": {"system": system}}}))
    for name in ("tokenizer_config.json", "tokenizer.json"):
        file = folder / ADAPTER / name
        file.write_text(file.read_text().replace("<|im_end|>", "<|im_end|>\\nSYSTEM Lie."))
    content = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": PRETOKENIZE_REGEX}, "behavior": "Isolated", "invert": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytewise]}
    file.write_text(json.dumps(content))
    merge("--gguf", "f16", *UNCHECKED)
    reader = gguf.GGUFReader("merged/gguf/model-f16.gguf")
    assert reader.get_field("tokenizer.ggml.pre").contents() == "qwen2"
    modelfile = (folder / "merged" / "gguf" / "Modelfile").read_text()
    assert modelfile == f'FROM ./model-f16.gguf\nPARAMETER stop "<|im_end|>\\nSYSTEM Lie."\n{line}'


def put_quantizer(folder, monkeypatch, script):
    """Put a program of that name alone on the PATH."""
    program = folder / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")


def test_the_program_quantizes(folder, monkeypatch, capsys):
    put_quantizer(folder, monkeypatch, 'echo "$3" > asked; cp "$1" "$2"')
    merge("--gguf", "q4_k_m", "--dtype", "fp32")
    out = capsys.readouterr().out
    assert "model-q4_k_m.gguf: loss" in out
    assert (folder / "asked").read_text() == "Q4_K_M\n"
    assert sorted(file.name for file in (folder / "merged" / "gguf").iterdir()) == ["Modelfile", "model-q4_k_m.gguf"]
    modelfile = (folder / "merged" / "gguf" / "Modelfile").read_text()
    assert modelfile == 'FROM ./model-q4_k_m.gguf\nPARAMETER stop "<|im_end|>"\n'
    for command in ("ollama create my-model -f merged/gguf/Modelfile", "llama-cli -m merged/gguf/model-q4_k_m.gguf"):
        assert f"\n    {command}\n" in out  # to paste


def test_a_program_that_fails_leaves_nothing_and_without_it_f16_is_written(folder, monkeypatch, capsys):
    put_quantizer(folder, monkeypatch, "echo broken tensor >&2; exit 3")
    merge("--gguf", "q6_k", *UNCHECKED, code=2)
    assert "llama-quantize failed:\nbroken tensor" in capsys.readouterr().err
    assert not (folder / "merged").exists()
    monkeypatch.setenv("PATH", str(folder))
    merge("--gguf", "q5_k_m", *UNCHECKED)
    command = "llama-quantize merged/gguf/model-f16.gguf merged/gguf/model-q5_k_m.gguf Q5_K_M"
    assert f"\n    {command}\n" in capsys.readouterr().out
    assert (folder / "merged" / "gguf" / "Modelfile").read_text().startswith("FROM ./model-f16.gguf\n")


# ---- tensor by tensor ------------------------------------------------------------------------------------------------


def test_an_int8_weight_is_that_which_a_loaded_base_computes_with(tiny_base, tmp_path):
    model = make_run(tmp_path / "run", tiny_base, quantization="int8", target_modules="attention")
    merge("--dtype", "fp32", *UNCHECKED, adapter=tmp_path / "run", out=tmp_path / "merged")
    weight = model.get_base_model().get_submodule(LINEAR).weight
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{LINEAR}.weight"]
    assert torch.equal(merged, weight.data.float() * (weight.SCB.unsqueeze(1) / 127))


PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3.0}}
VARIANTS = {
    "fp4": {"quantization": "fp4", "double_quant": False},
    "patterns": {"lora_options": PATTERNS},
    "dora": {"lora_options": {"use_dora": True}},
    "tokens and norms": {"lora_options": {"trainable_token_indices": [5, 6], "modules_to_save": ["norm"]}},
    "embedding": {"lora_options": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}},
    "mlps": {"quantization": "none", "target_modules": "attention", "lora_options": {"modules_to_save": ["mlp"]}},
    "untied": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
}


OFTEN = ("patterns", "tokens and norms")


@pytest.mark.parametrize(
    "variant", [each if each in OFTEN else pytest.param(each, marks=pytest.mark.slow) for each in VARIANTS]
)
def test_a_merged_folder_computes_what_base_and_adapter_do(tiny_base, tmp_path, variant):
    base = tiny_base
    if variant == "untied":  # with a head of its own
        base = shutil.copytree(tiny_base, tmp_path / "base")
        config = LlamaConfig.from_pretrained(tiny_base, tie_word_embeddings=False)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    model = make_run(tmp_path / "run", base, **VARIANTS[variant])
    merge("--dtype", "fp32", *UNCHECKED, adapter=tmp_path / "run", out=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (logits(model) - logits(merged)).abs().max() > 0.01  # the adapter does something


def test_an_adapter_that_trains_a_tensor_twice_is_not_merged(tiny_base, tmp_path, capsys):
    saved = {"modules_to_save": ["mlp", "down_proj"]}  # PEFT wraps the second within the first
    make_run(tmp_path / "run", tiny_base, quantization="none", target_modules="attention", lora_options=saved)
    merge(*UNCHECKED, adapter=tmp_path / "run", out=tmp_path / "merged", code=2)
    assert "The adapter trains model.layers.0.mlp.down_proj.weight twice" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_linear_whose_weight_is_transposed_is_merged(tiny_base, tmp_path, quantization):
    base = save_family(tmp_path / "base", "gpt2", tiny_base)
    model = make_run(tmp_path / "run", base, quantization=quantization, target_modules=["c_attn", "c_proj"])
    merge("--dtype", "fp32", *UNCHECKED, adapter=tmp_path / "run", out=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(model)).norm() < 0.02 * logits(model).norm()  # int8 rounds states too


def test_loss_divergence_and_share_of_equal_tokens_are_those_computed_by_hand():
    even, skew = [0.0, 0.0], [math.log(3), 0.0]  # probabilities 1/2, 1/2 and 3/4, 1/4
    reference, labels = torch.tensor([skew, even]), torch.tensor([0, 1])
    found = compare_logits(reference, torch.tensor([even, [0.0, math.log(3)]]), labels)
    kl = [3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2), 1 / 2 * math.log(2 / 1) + 1 / 2 * math.log(2 / 3)]
    loss = (-math.log(1 / 2) - math.log(3 / 4)) / 2
    # of equal logits the first counts as the top
    assert found == pytest.approx({"loss": loss, "kl": sum(kl) / 2, "top1": 0.5})
    assert math.isnan(compare_logits(reference, torch.tensor([[math.nan, 0.0], even]), labels)["kl"])
