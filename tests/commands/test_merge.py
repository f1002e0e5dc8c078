"""``merge`` as a user runs it, on a small base."""

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lightning.cli import main
from qlora_lightning.model.merge import MergedWeights
from tests.adapters import make_run
from tests.commands.conftest import help_examples

ADAPTER = "runs/quickstart/adapter"
NAME = "model.layers.1.mlp.up_proj"
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def whole(small_base, tmp_path_factory):
    """A run's folder, merged into all that a merge can write; and the model that the adapter was written from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("merge"))
        model = make_run(folder / "runs" / "quickstart", small_base)
        merge("--out", "merged", "--dtype", "fp32", "--gguf", "f16")
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


def merge(*arguments, code=0, adapter=ADAPTER):
    assert main(["merge", "--adapter", adapter, *arguments]) == code


def paths(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("arguments", help_examples("merge"), ids=" ".join)
def test_the_examples_of_help_run(arguments, folder, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "  merged: loss " in out
    if "q8_0" in arguments:
        tensors = gguf.GGUFReader("runs/quickstart/gguf/gguf/model-q8_0.gguf").tensors
        assert {tensor.tensor_type.name for tensor in tensors} == {"F32", "Q8_0"}


def test_the_merged_folder_is_a_model_for_plain_transformers_and_agrees(merged, whole, small_base):
    model = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, whole[1](IDS).logits, rtol=1e-4, atol=1e-4)
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


def test_an_adapter_of_another_tool_is_added_to_the_original_weights(folder, small_base, capsys):
    (folder / "foreign").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(f"{ADAPTER}/{name}", "foreign")
    merge("--out", "merged", "--dtype", "fp32", "--data.val", "runs/quickstart/val.jsonl", adapter="foreign")
    assert "does not say how its base was quantized" in capsys.readouterr().out
    before, after = load_file(small_base / "model.safetensors"), load_file("merged/model.safetensors")
    assert before.keys() == after.keys()
    tensors = load_file("foreign/adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{NAME}.lora_{each}.weight"] for each in "AB")
    torch.testing.assert_close(after[f"{NAME}.weight"], before[f"{NAME}.weight"] + 2.0 * b @ a)  # alpha is 2 x rank
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_without_rows_a_merge_is_written_only_unchecked(folder, small_base, capsys):
    """As in a folder that was moved: the base is there, the data are not."""
    for gone in ("gone.jsonl", "gone"):
        config = {"model": {"base": str(small_base)}, "data": {"train": gone, "val": gone}}
        (folder / "runs/quickstart/config.yaml").write_text(json.dumps(config))
        merge("--out", "merged", code=2)
        err = capsys.readouterr().err
        assert f"No rows to check the merge on. data.val: data file {gone} does not exist" in err
        assert "Or add --rows 0: it is written unchecked." in err
    merge("--out", "merged", "--rows", "0")
    assert json.loads((folder / "merged" / "merge.json").read_text())["check"] is None


@pytest.mark.parametrize(
    ("function", "typed", "name"),
    [((MergedWeights, "__call__"), [], "merged"), ((gguf.quants, "quantize"), ["--gguf", "f16"], "model-f16.gguf")],
)
def test_a_model_that_disagrees_is_not_kept(folder, capsys, monkeypatch, function, typed, name):
    """What is written is loaded again: a fault in either file is seen."""
    usual = getattr(*function)
    monkeypatch.setattr(*function, lambda *arguments: 2 * usual(*arguments))
    before = paths(folder)
    merge("--out", "merged", "--rows", "2", *typed, code=2)
    assert f"The merged model is not kept: {name} differs" in capsys.readouterr().err
    assert paths(folder) == before


def test_only_a_merged_model_is_replaced_and_only_by_force(folder, capsys):
    (folder / ".merged.unfinished").mkdir()  # of a merge that was killed
    merge("--out", "merged", "--rows", "0")
    merge("--out", "merged", "--rows", "0", code=2)
    assert "--out merged exists" in capsys.readouterr().err
    merge("--out", "merged", "--rows", "0", "--dtype", "fp16", "--force")
    assert load_file("merged/model.safetensors")["model.norm.weight"].dtype == torch.float16
    assert not (folder / ".merged.unfinished").exists()
    before = paths(folder)
    merge("--out", "runs/quickstart", "--force", code=2)
    assert paths(folder) == before
