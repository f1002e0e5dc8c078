"""The adapter folder: what plain PEFT loads, whole or not at all, and refused if it is damaged."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_lightning import QLoRAModule
from qlora_lightning.base.adapter_folder import read_identity
from qlora_lightning.base.cache import list_entries
from qlora_lightning.base.folder import load_tokenizer
from qlora_lightning.model.adapters.folder import (
    fill_adapter,
    loading_snippet,
    open_adapter_folder,
    read_tensors,
    refill_folder,
    save_adapter_folder,
)
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.support.errors import UserError
from tests.adapters import make_adapter

IDS = [5, 6, 7, 8, 9, 10]
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "qlora_lightning.json"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
WEIGHTS = "adapter_model.safetensors"

# PEFT 0.21 asks transformers 5.24 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """An adapter folder on an nf4 base, and its model."""
    folder = tmp_path_factory.mktemp("made") / "adapter"
    return folder, make_adapter(folder, tiny_base, std=0.1)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "adapter")


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def save(folder, model, tokenizer=None, stop_ids=(), **identity):
    known = {"base": "org/base", "quantization": "none", "compute_dtype": "float32", **identity}
    save_adapter_folder(folder, model, tokenizer, known, stop_ids)
    return folder


# ---- what others load ------------------------------------------------------------------------------------------------

PLAIN_PEFT = """
import sys, torch, warnings
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, place, ids = sys.argv[1], sys.argv[2], sys.argv[3], [int(token) for token in sys.argv[4:]]
settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=settings)
model = PeftModel.from_pretrained(model, adapter).train()  # no dropout; eval() may compute in bf16 on a CPU
with torch.no_grad():
    torch.save(model(input_ids=torch.tensor([ids])).logits, place)
assert "qlora_lightning" not in sys.modules
"""


def test_plain_peft_in_another_process_computes_the_same_logits(made, tiny_base, tmp_path):
    folder, model = made
    place = tmp_path / "logits"
    arguments = [str(tiny_base), str(folder), str(place), *map(str, IDS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PLAIN_PEFT, *arguments], check=True, env=environment, capture_output=True)
    ours = logits(model)
    torch.testing.assert_close(torch.load(place, weights_only=True), ours, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (logits(model) - ours).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_the_snippet_of_the_card_runs_and_computes_the_same_logits(tiny_base, tmp_path, quantization):
    model = make_adapter(tmp_path, tiny_base, quantization)
    snippet = loading_snippet(tmp_path, read_identity(tmp_path))
    assert f"```python\n{snippet}\n```" in (tmp_path / "README.md").read_text()
    names = {}
    exec(snippet, names)
    # in eval() bitsandbytes' layers on a CPU compute another function; without dropout, train() is what was trained
    torch.testing.assert_close(logits(names["model"].train()), logits(model), rtol=1e-4, atol=1e-4)
    assert names["tokenizer"].get_vocab() == AutoTokenizer.from_pretrained(tiny_base).get_vocab()


def test_the_cached_base_and_the_folder_load_as_lm_evaluation_harness_loads_them(tiny_base, tmp_path, monkeypatch):
    """What its class HFLM does with `pretrained=…,peft=…,tokenizer=…,dtype=…` (lm-eval 0.4.13, checked by hand)."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    module = QLoRAModule(base=str(tiny_base), compute_dtype="fp32")
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    module.save_adapter(tmp_path / "adapter", load_tokenizer(str(tiny_base)))
    (entry,) = list_entries("quantized")
    base = AutoModelForCausalLM.from_pretrained(entry.path, dtype=torch.float32)
    # else it would resize the embedding
    assert base.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "adapter"))
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), revision="main").train()  # as above
    torch.testing.assert_close(logits(theirs), logits(module.model.eval()), rtol=1e-4, atol=1e-4)


def test_the_folder_holds_weights_config_identity_card_and_tokenizer_with_its_template(made, tiny_base):
    folder, model = made
    assert contents(folder).keys() >= FILES | TOKENIZER_FILES
    template = AutoTokenizer.from_pretrained(tiny_base).chat_template
    assert AutoTokenizer.from_pretrained(folder).chat_template == template
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(tiny_base), 4, 8)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["inference_mode"]
    identity = read_identity(folder)
    assert (identity["format_version"], identity["base"], identity["adapter"]["rank"]) == (1, str(tiny_base), 4)
    weights, own = load_file(folder / WEIGHTS), trainable_tensors(model)
    assert weights.keys() == {name.replace(".default", "") for name in own}
    assert all(torch.equal(weights[name.replace(".default", "")], tensor) for name, tensor in own.items())


def test_the_generation_config_is_the_bases_with_every_stop_token_the_tokenizers_first(made, tiny_base, tmp_path):
    model = made[1]
    before = GenerationConfig.from_dict(model.get_base_model().generation_config.to_dict())
    model.get_base_model().generation_config.update(eos_token_id=[7, 8], pad_token_id=None, do_sample=True, top_p=0.5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.eos_token = "<|endoftext|>"
    save(tmp_path, model, tokenizer, stop_ids=[2, 7])
    model.get_base_model().generation_config = before
    wanted = {"eos_token_id": [0, 2, 7, 8], "bos_token_id": 1, "pad_token_id": 2, "do_sample": True, "top_p": 0.5}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == wanted


def test_the_snippets_model_stops_where_the_bases_generation_config_would_not(tiny_base, tmp_path):
    model = make_adapter(tmp_path / "known", tiny_base, "none")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    def generate(folder):
        names = {}
        exec(loading_snippet(folder, read_identity(folder)), names)
        prompt = torch.tensor([IDS])
        answer = names["model"].generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8)
        return answer[0, len(IDS) :].tolist()

    endless = generate(tmp_path / "known")  # the base's config knows the tokenizer's end
    assert len(endless) == 8
    stop = endless[3]
    lacking = save(tmp_path / "lacking", model, tokenizer, [stop], base=str(tiny_base))
    config = json.loads((lacking / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_base)
    assert generate(lacking) == endless[: endless.index(stop) + 1]


# ---- whole or not at all ---------------------------------------------------------------------------------------------


def test_saving_twice_gives_the_same_bytes_and_only_changed_tensors_change_a_file(made, tiny_base, tmp_path):
    model, tokenizer = made[1], AutoTokenizer.from_pretrained(tiny_base)
    first = contents(save(tmp_path, model, tokenizer))
    assert contents(save(tmp_path, model, tokenizer)) == first
    tensor = next(iter(trainable_tensors(model).values()))
    with torch.no_grad():
        tensor.add_(1.0)
        after = contents(save(tmp_path, model, tokenizer))
        tensor.sub_(1.0)
    assert {name for name in after if after[name] != first[name]} == {WEIGHTS}


def test_saving_asks_no_network_and_gives_files_the_mode_of_the_umask(made, tmp_path, monkeypatch):
    import huggingface_hub.constants

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    model = made[1]
    monkeypatch.setattr(model.peft_config["default"], "base_model_name_or_path", "org/base")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    old = os.umask(0o027)
    try:
        save(tmp_path / "adapter", model)
    finally:
        os.umask(old)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "adapter").iterdir()}
    assert modes == dict.fromkeys(FILES, "0o640")


class KilledError(BaseException):
    pass


OLD, SAME_CONFIG, OTHER_CONFIG = ("alpha 4", "old"), ("alpha 4", "new"), ("alpha 8", "new")


def refill(folder, config, weights, own=()):
    def write(place):
        for name, text in as_files(config, weights).items():
            (place / name).write_text(text)

    refill_folder(folder, write, key_file="weights", own=own)


def as_files(config, weights):
    return {"config": config, "card": "card", "weights": weights}


def read(folder):
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("new", [SAME_CONFIG, OTHER_CONFIG])
@pytest.mark.parametrize("number", range(1, 6))
def test_a_kill_at_any_change_of_the_folder_mixes_no_two_adapters(tmp_path, monkeypatch, new, number):
    folder, left = tmp_path / "a", [number]
    refill(folder, *OLD)
    (folder / "notes.txt").write_text("mine")

    def dying(change):
        def change_or_die(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                raise KilledError
            return change(*args, **kwargs)

        return change_or_die

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", dying(os.replace))
        patch.setattr("pathlib.Path.unlink", dying(Path.unlink))
        try:
            refill(folder, *new)
        except KilledError:
            pass
        else:
            assert number > 1
    found = read(folder)
    assert found.pop("notes.txt") == "mine"
    assert "weights" not in found or found in (as_files(*OLD), as_files(*new))
    refill(folder, *new)
    assert read(folder) == {**as_files(*new), "notes.txt": "mine"}
    assert sorted(entry.name for entry in folder.iterdir()) == ["card", "config", "notes.txt", "weights"]


def test_what_an_earlier_filling_wrote_and_this_one_does_not_goes_also_behind_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to("disk")
    refill(tmp_path / "a", *OLD)
    (tmp_path / "a" / "template").write_text("old")
    refill(tmp_path / "a", *OTHER_CONFIG, own=("template", "other"))
    assert read(tmp_path / "disk") == as_files(*OTHER_CONFIG)
    assert (tmp_path / "a").is_symlink()


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path):
    refill(tmp_path / "a", *OLD)

    def fail(place):
        (place / "config").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        refill_folder(tmp_path / "a", fail, key_file="weights")
    assert read(tmp_path / "a") == as_files(*OLD)


# ---- read, and refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base)


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors, next(iter(tensors)))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_tensors_go_to_their_places_to_be_trained_further(folder, base):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = open_adapter_folder(base, folder)
    assert torch.equal(torch.get_rng_state(), state)
    tensors, own = load_file(folder / WEIGHTS), trainable_tensors(model)
    assert {name.replace(".default", "") for name in own} == tensors.keys()
    assert all(torch.equal(tensor, tensors[name.replace(".default", "")]) for name, tensor in own.items())
    assert model.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] == 2.0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"rank": 4}, None), ({"rank": 2}, "has shape"), ({"rank": 4, "target_modules": "mlp"}, "are foreign")],
)
def test_an_adapter_made_otherwise_takes_the_tensors_of_a_folder_that_fits(folder, tiny_base, options, sentence):
    module = QLoRAModule(str(tiny_base), compute_dtype="fp32", **options)
    module.configure_model()
    if sentence is None:
        fill_adapter(module.model, folder)
        tensors = load_file(folder / WEIGHTS)
        own = module.state_dict()
        assert all(torch.equal(own[f"model.{name[:-7]}.default.weight"], tensors[name]) for name in tensors)
    else:
        with pytest.raises(UserError, match=f"{re.escape(str(folder))} does not fit .*{sentence}"):
            fill_adapter(module.model, folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors, name: tensors.pop(name), "1 tensors are missing in it and 0 are foreign"),
        (lambda tensors, name: tensors.update(more=torch.ones(1)), "0 tensors are missing in it and 1 are foreign"),
        (
            lambda tensors, name: tensors.update({name: torch.ones(3, 128)}),
            r"has shape \(3, 128\) there and \(4, 128\)",
        ),
        (lambda tensors, name: tensors[name][0].fill_(torch.nan), "is damaged: 128 of 512 values of .* are NaN"),
        (lambda tensors, name: tensors[name][0].fill_(-torch.inf), "are NaN or infinite"),
    ],
)
def test_tensors_that_do_not_fit_or_are_no_numbers_are_refused(folder, base, change, sentence):
    change_tensors(folder, change)
    with pytest.raises(UserError, match=sentence):
        open_adapter_folder(base, folder)


@pytest.mark.parametrize("size", [0, 5, 4000])
def test_weights_that_are_cut_off_are_refused(folder, base, size):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        open_adapter_folder(base, folder)


def test_one_flipped_bit_is_refused_and_tensors_without_a_hash_are_not(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(UserError, match="do not match the hash in its metadata"):
        read_tensors(folder)
    change_tensors(folder, lambda tensors, name: tensors[name].add_(1))  # PEFT writes no hash
    assert len(read_tensors(folder)) == 28
