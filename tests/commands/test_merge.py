"""The command as a user runs it, on a tiny base."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import bitsandbytes as bnb
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lightning.base.cache import hash_key
from qlora_lightning.cli import main
from qlora_lightning.commands.merge.arguments import make_parser
from qlora_lightning.model.base_model import load_base
from tests.adapters import make_run

ADAPTER = "runs/quickstart/adapter"
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    return folder, make_run(folder / "runs" / "quickstart", tiny_base)


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A folder of its own, where the examples have theirs."""
    (tmp_path / "runs").mkdir()
    run = tmp_path / "runs" / "quickstart"
    run.mkdir()
    for name in ("adapter", "config.yaml", "val.jsonl"):
        (run / name).symlink_to(made[0] / "runs" / "quickstart" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def merge(*arguments, code=0):
    assert main(["merge", "--adapter", ADAPTER, *arguments]) == code


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if "quickstart/" not in str(path))


def examples():
    lines = [line.strip() for line in make_parser().format_help().splitlines()]
    return [line for line in lines if line.startswith("qlora-lightning merge --adapter")]


def test_help_has_examples():
    assert len(examples()) == 3


@pytest.mark.parametrize("line", examples())
def test_the_examples_of_help_run_as_they_stand(line, folder, capsys):
    assert main(shlex.split(line)[1:]) == 0
    out = capsys.readouterr().out
    if "--out" in line:
        assert "base + adapter" in out
        assert "written: onto dequantized, bf16" in out
        assert "model.safetensors" in out
    else:
        assert "Adapter alone: runs/quickstart/adapter.gguf" in out


def test_the_merged_folder_is_a_model_for_plain_transformers(folder, made, tiny_base):
    merge("--out", "merged", "--dtype", "fp32", "--json", "found.json")
    model = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, made[1](IDS).logits, rtol=1e-4, atol=1e-4)
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config = json.loads((folder / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    tokenizer, own = AutoTokenizer.from_pretrained("merged"), AutoTokenizer.from_pretrained(tiny_base)
    assert tokenizer.chat_template == own.chat_template
    stops = json.loads((folder / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert config["eos_token_id"] == stops == model.generation_config.eos_token_id
    found = json.loads((folder / "found.json").read_text())
    assert found == json.loads((folder / "merged" / "merge.json").read_text())
    check = found["check"]
    assert check["rows"] == 8
    for name in ("onto dequantized, fp32", "written: onto dequantized, fp32"):
        assert check[name]["kl"] < 1e-6
        assert check[name]["top1"] == 1.0
        assert check[name]["loss"] == pytest.approx(check["base + adapter"]["loss"], abs=1e-5)
    assert check["onto original, fp32"]["kl"] > 1e-5


def test_the_trained_base_comes_from_the_cache_bit_for_bit_whatever_quantized_it(
    folder, made, tiny_base, tmp_path, monkeypatch
):
    def merged(name):
        merge("--out", name, "--dtype", "fp32", "--rows", "0")
        return load_file(f"{name}/model.safetensors")

    cached = merged("cached")
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    again = merged("again")
    assert all(torch.equal(tensor, cached[name]) for name, tensor in again.items())
    usual = bnb.functional.quantize_4bit
    with monkeypatch.context() as patch:  # a GPU may round otherwise
        patch.setattr(
            bnb.functional, "quantize_4bit", lambda weight, *more, **options: usual(2 * weight, *more, **options)
        )
        load_base(str(tiny_base), compute_dtype=torch.float32)
    (entry,) = (tmp_path / "cache" / "quantized").glob("*/entry.json")
    key = json.loads(entry.read_text())["key"]
    entry.parent.rename(entry.parent.with_name(hash_key({**key, "device": "cuda"})))
    other = merged("other")
    adapter = load_file(f"{ADAPTER}/adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{each}.weight"] for each in "AB")
    update = 2.0 * b @ a
    torch.testing.assert_close(other[f"{name}.weight"] - update, 2 * (cached[f"{name}.weight"] - update))
    assert torch.equal(other["model.norm.weight"], cached["model.norm.weight"])


def test_onto_the_original_weights_is_the_original_plus_the_update(folder, tiny_base):
    merge("--out", "merged", "--onto", "original", "--dtype", "fp32")
    before, after = load_file(tiny_base / "model.safetensors"), load_file("merged/model.safetensors")
    assert before.keys() == after.keys()
    adapter = load_file(f"{ADAPTER}/adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{each}.weight"] for each in "AB")
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 2.0 * b @ a)  # alpha is 2 x rank
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_a_model_that_disagrees_is_not_kept(folder, capsys):
    before = written(folder)
    merge("--out", "merged", "--max-kl", "0", "--json", "found.json", code=2)
    captured = capsys.readouterr()
    assert "The merged model is not kept" in captured.err
    assert "written: onto dequantized, bf16: KL" in captured.err
    assert "base + adapter" in captured.out  # the table says by how much
    assert written(folder) == before


def test_nothing_is_written_over_unless_it_is_a_merged_model_and_force_is_given(folder, capsys):
    merge("--out", "merged", "--rows", "0")
    merge("--out", "merged", "--rows", "0", code=2)
    assert "--out merged exists" in capsys.readouterr().err
    merge("--out", "merged", "--rows", "0", "--dtype", "fp16", "--force")
    assert load_file("merged/model.safetensors")["model.norm.weight"].dtype == torch.float16
    assert not list(folder.glob(".merged*"))
    merge("--out", "runs/quickstart", "--force", code=2)
    assert "holds something else than a merged model" in capsys.readouterr().err
    (folder / "merge.json").write_text('{"files": {}}')  # somebody else's
    merge("--out", ".", "--force", code=2)
    assert "holds something else than a merged model" in capsys.readouterr().err
    (folder / "notes.txt").write_text("mine")
    merge("--adapter-gguf", "notes.txt", code=2)
    assert "exists" in capsys.readouterr().err
    merge("--adapter-gguf", "notes.txt", "--force", code=2)
    assert "is no GGUF file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["notes.txt", "mine/notes.txt", "gguf"])
def test_force_does_not_remove_what_merge_did_not_write(name, folder, capsys):
    merge("--out", "merged", "--rows", "0")
    place = folder / "merged" / name
    place.parent.mkdir(exist_ok=True)
    place.mkdir() if name == "gguf" else place.write_text("mine")
    before = written(folder)
    merge("--out", "merged", "--rows", "0", "--force", code=2)
    assert f"--out merged holds {name}, which merge did not write" in capsys.readouterr().err
    assert written(folder) == before


def test_what_comes_into_the_folder_while_it_is_merged_is_not_removed(folder, capsys, monkeypatch):
    from qlora_lightning.commands.merge import run

    def write_and_be_overtaken(*arguments):
        write_tensors(*arguments)
        (folder / "merged").mkdir()
        (folder / "merged" / "other").write_text("of another process")

    write_tensors = run.write_tensors
    monkeypatch.setattr(run, "write_tensors", write_and_be_overtaken)
    merge("--out", "merged", "--rows", "0", code=2)
    assert "--out merged exists" in capsys.readouterr().err
    assert written(folder / "merged") == ["other"]


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(folder):
    (folder / "disk").mkdir()
    (folder / "merged").symlink_to("disk/model")
    merge("--out", "merged", "--rows", "0", "--json", "found.json")
    merge("--out", "merged", "--rows", "0", "--dtype", "fp16", "--force")
    assert (folder / "merged").is_symlink()
    assert load_file("disk/model/model.safetensors")["model.norm.weight"].dtype == torch.float16
    assert sorted(entry.name for entry in folder.iterdir()) == ["disk", "found.json", "merged", "runs"]
    assert [entry.name for entry in (folder / "disk").iterdir()] == ["model"]


def test_all_files_of_a_merged_model_have_the_mode_of_the_umask(folder):
    old = os.umask(0o027)
    try:
        merge("--out", "merged", "--rows", "0", "--adapter-gguf", "a.gguf")
    finally:
        os.umask(old)
    files = [folder / "a.gguf", *(file for file in (folder / "merged").rglob("*"))]
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {file.name: "0o640" for file in files}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--out is missing"),
        (("--out", "runs", "--adapter-gguf", "runs/a.gguf"), "--adapter-gguf runs/a.gguf lies in --out runs"),
        (("--out", "runs", "--json", "runs/../runs/a.json"), "lies in --out runs"),
        (("--out", "new", "--adapter-gguf", "new/a.gguf"), "--adapter-gguf new/a.gguf lies in --out new"),
        (("--out", "new", "--adapter-gguf", "new"), "--out and --adapter-gguf both name new"),
        (("--out", "x", "--json", "runs/quickstart/val.jsonl", "--force"), "val.jsonl: this command reads that file"),
        (("--out", "x", "--json", f"{ADAPTER}/adapter_config.json"), "this command reads that file"),
        (("--adapter-gguf", "a", "--json", "./a"), "--adapter-gguf and --json both name a"),
        (("--adapter-gguf", f"{ADAPTER}/adapter_model.safetensors", "--force"), "this command reads that file"),
        (("--out", "runs/quickstart/val.jsonl", "--force"), "that is a file; name a folder"),
        (("--out", "runs/quickstart/val.jsonl/x"), "val.jsonl is a file; name a folder"),
        (("--out", "/proc/merged"), "--out /proc/merged: nothing can be written there"),
        (("--out", "/proc/merged", "--force"), "nothing can be written there"),
        (("--out", "x", "stray"), "unrecognized arguments: stray"),
        (("--out", "x", "--data.val", "runs/quickstart/val.jsonl", "stray"), "unrecognized arguments: stray"),
        (("--out", "x", "--data.val"), "--data.val: expected a value"),
        (("--out", "x", "--model.rank", "3"), "--model.rank: the model is what the adapter folder says"),
        (("--out", "x", "--rows", "0", "--data.nothing", "3"), "--data.nothing chooses rows for the check"),
        (("--out", "x", "--max-kl", "nan"), "--max-kl is nan"),
        (("--out", "x", "--gguf", "q4_0"), "invalid choice: 'q4_0'"),
        (("--json", "x.json", "--adapter-gguf", "x.gguf"), "--json holds the figures of a merged model"),
        (("--gguf", "f16", "--adapter-gguf", "x.gguf"), "--gguf writes the merged model"),
        (("--out", "x", "--rows", "-1"), "--rows is -1"),
        (("--out", "x", "--max-kl", "-1"), "--max-kl is -1"),
        (("--out", "x", "--json", "none/x.json"), "there is no folder none"),
        (("--out", "x", "--adapter", "none"), "none is not an adapter folder"),
        (("--out", "x", "--base", "none"), "Base 'none': no such file or folder"),
        (("--out", "x", "--config", "none.yaml"), "none.yaml, but there is no such file"),
        (("--out", "x", "--data.val", "none.jsonl"), "none.jsonl"),
        (("--out", "x", "--nothing"), "unrecognized arguments: --nothing"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, words, folder, capsys):
    before = written(folder)
    merge(*arguments, code=2)
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert written(folder) == before


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("generation_config.json", '{"eos_token_id": [', "generation_config.json is not JSON"),
        ("chat_template.jinja", "{% for message in messages %}{{", "the chat template of"),
    ],
)
def test_a_damaged_file_of_the_adapter_ends_the_merge(name, text, words, made, folder, capsys):
    shutil.copytree(made[0] / ADAPTER, folder / "damaged")
    (folder / "damaged" / name).write_text(text)
    before = written(folder)
    assert main(["merge", "--adapter", "damaged", "--out", "merged", "--rows", "0"]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert written(folder) == before


def test_an_adapter_of_another_tool_is_merged_onto_the_original(folder, made, capsys):
    files = ("adapter_config.json", "adapter_model.safetensors")
    (folder / "foreign").mkdir()
    for name in files:
        (folder / "foreign" / name).write_bytes((folder / ADAPTER / name).read_bytes())
    assert main(["merge", "--adapter", "foreign", "--out", "merged"]) == 2
    assert "does not say how its base was quantized" in capsys.readouterr().err
    assert main(["merge", "--adapter", "foreign", "--out", "merged", "--onto", "original"]) == 2
    assert "there is no config.yaml beside the adapter folder" in capsys.readouterr().err
    rows = ("--data.val", "runs/quickstart/val.jsonl", "--data.tokenizer", str(folder / "tiny"))
    (folder / "tiny").symlink_to(json.loads((folder / ADAPTER / "qlora_lightning.json").read_text())["base"])
    assert main(["merge", "--adapter", "foreign", "--out", "merged", "--onto", "original", *rows]) == 0
    check = json.loads((folder / "merged" / "merge.json").read_text())["check"]
    assert set(check) == {
        "rows", "labelled_tokens", "base + adapter",
        "onto original, fp32", "written: onto original, bf16",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["f16", pytest.param("q8_0", marks=pytest.mark.slow)])
def test_a_gguf_file_holds_the_same_model(kind, folder, made, tiny_base):
    merge("--out", "merged", "--gguf", kind)
    check = json.loads((folder / "merged" / "merge.json").read_text())["check"]
    assert check[f"written: model-{kind}.gguf"]["kl"] < (1e-6 if kind == "f16" else 1e-3)
    reader = gguf.GGUFReader(f"merged/gguf/model-{kind}.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["output_norm.weight"] == "F32"
    assert types["blk.1.attn_q.weight"] == types["token_embd.weight"] == kind.upper()
    assert "output.weight" not in types  # tied
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    field = lambda name: reader.get_field(name).contents()  # noqa: E731
    assert field("general.architecture") == "llama"
    assert field("llama.attention.head_count_kv") == 2
    assert field("tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert field("tokenizer.chat_template") == tokenizer.chat_template
    assert field("tokenizer.ggml.tokens")[:300] == tokenizer.convert_ids_to_tokens(range(300))
    again = AutoTokenizer.from_pretrained("merged/gguf", gguf_file=f"model-{kind}.gguf")
    text = "<|im_start|>user\nIt's 12:30, I'd say.\n\nGrüße 🙂<|im_end|>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert (again.chat_template, again.eos_token_id) == (tokenizer.chat_template, tokenizer.eos_token_id)


def test_an_adapter_alone_as_gguf_is_the_same_update(folder, made):
    merge("--adapter-gguf", "a.gguf")
    reader = gguf.GGUFReader("a.gguf")
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == 2 * 2 * 7
    adapter = load_file(f"{ADAPTER}/adapter_model.safetensors")
    for name, place, heads in (
        ("model.layers.1.mlp.up_proj", "blk.1.ffn_up", None),
        ("model.layers.0.self_attn.k_proj", "blk.0.attn_k", 2),
    ):
        a, b = (adapter[f"base_model.model.{name}.lora_{each}.weight"].numpy() for each in "AB")
        if heads:  # rows of a head: first half and second half in turns
            rows = b.reshape(heads, 2, -1, b.shape[1])
            b = np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(b.shape)
        own_a, own_b = tensors[f"{place}.weight.lora_a"], tensors[f"{place}.weight.lora_b"]
        np.testing.assert_array_equal(own_a, a)
        np.testing.assert_allclose(alpha / len(a) * own_b, 2.0 * b, rtol=1e-6)


PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for place, options in ("merged", {}), ("merged/gguf", {"gguf_file": "model-f16.gguf"}):
    model = AutoModelForCausalLM.from_pretrained(place, **options)
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Count to 3."}], add_generation_prompt=True,
                                        return_dict=True, return_tensors="pt")
    print(model.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist())
assert "qlora_lightning" not in sys.modules
"""


@pytest.mark.slow
def test_a_process_with_plain_transformers_opens_model_and_gguf_and_both_answer_alike(folder):
    merge("--out", "merged", "--gguf", "f16")
    done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, check=True)
    one, other = done.stdout.splitlines()[-2:]
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_stopped_merge_leaves_no_output(how, folder):
    before = written(folder)
    command = [sys.executable, "-m", "qlora_lightning", "merge", "--adapter", ADAPTER, "--out", "merged"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not list(folder.glob(".merged.*")):
        time.sleep(0.01)
    process.send_signal(how)
    err = process.communicate()[1]
    assert not (folder / "merged").exists()
    if how != signal.SIGKILL:
        assert process.returncode == 128 + how
        assert ("interrupted" if how == signal.SIGINT else f"ended by {how.name}") in err
        assert written(folder) == before
