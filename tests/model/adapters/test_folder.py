"""The adapter folder: what plain PEFT loads, whole or not at all, and rejected if it is damaged."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lightning import QLoRAModule
from qlora_lightning.base.adapter_folder import read_identity
from qlora_lightning.base.cache import list_entries
from qlora_lightning.base.folder import load_tokenizer
from qlora_lightning.model.adapters.folder import fill_adapter, loading_snippet, save_adapter_folder
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.support.errors import UserError
from tests.adapters import make_adapter
from tests.equality import same
from tests.steps import make_module

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
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def save(folder, model, tokenizer=None, stop_ids=(), **identity):
    known = {"base": "org/base", "quantization": "none", "compute_dtype": "float32", **identity}
    save_adapter_folder(folder, model, tokenizer, known, stop_ids)
    return folder


# ---- what others load ------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch
SNIPPET
# no dropout; in eval() bitsandbytes' layers on a CPU compute another function
with torch.no_grad():
    torch.save(model.train()(input_ids=torch.tensor([IDS])).logits, sys.argv[1])
assert "qlora_lightning" not in sys.modules
assert len(tokenizer) == model.config.vocab_size
"""


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_plain_peft_computes_the_same_logits_by_the_lines_of_the_card(tiny_base, tmp_path, quantization):
    model = make_adapter(tmp_path, tiny_base, quantization, std=0.1)
    of_card = loading_snippet(".", read_identity(tmp_path))
    assert f"```python\n{of_card}\n```" in (tmp_path / "README.md").read_text()
    program = PROGRAM.replace("SNIPPET", loading_snippet(tmp_path, read_identity(tmp_path))).replace("IDS", str(IDS))
    command, environment = (
        [sys.executable, "-c", program, str(tmp_path / "logits")],
        {**os.environ, "OMP_NUM_THREADS": "1"},
    )
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found = torch.load(tmp_path / "logits", weights_only=True)
    ours = logits(model)
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (logits(model) - ours).abs().max() > 0.1  # the adapter does something


def test_the_cached_base_and_the_folder_load_as_lm_evaluation_harness_loads_them(tiny_base, tmp_path, monkeypatch):
    """What its class HFLM does with `pretrained=…,peft=…,tokenizer=…,dtype=…` (lm-eval 0.4.13, checked by hand)."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    module = make_module(tiny_base)
    module.save_adapter(tmp_path / "adapter", load_tokenizer(str(tiny_base)))
    (entry,) = list_entries("quantized")
    base = AutoModelForCausalLM.from_pretrained(entry.path, dtype=torch.float32)
    # else it would resize the embedding
    assert base.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "adapter"))
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), revision="main").train()  # as above
    torch.testing.assert_close(logits(theirs), logits(module.model.eval()), rtol=1e-4, atol=1e-4)


def test_the_folder_holds_weights_config_identity_card_and_tokenizer_with_its_template(made, tiny_base, tmp_path):
    folder, model = made
    assert contents(folder).keys() >= FILES | TOKENIZER_FILES
    written = json.loads((folder / "qlora_lightning.json").read_text())
    save_adapter_folder(tmp_path, model, AutoTokenizer.from_pretrained(tiny_base), written)
    assert contents(tmp_path) == contents(folder)  # no file names the folder
    template = AutoTokenizer.from_pretrained(tiny_base).chat_template
    assert AutoTokenizer.from_pretrained(folder).chat_template == template
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(tiny_base), 4, 8)
    assert (written["format_version"], written["base"], written["adapter"]["rank"]) == (1, str(tiny_base), 4)
    own = {name.replace(".default", ""): tensor.detach() for name, tensor in trainable_tensors(model).items()}
    assert same(load_file(folder / WEIGHTS), own)


def test_the_model_of_the_card_stops_where_the_bases_generation_config_would_not(tiny_base, tmp_path):
    model, tokenizer = make_adapter(tmp_path / "known", tiny_base, "none"), AutoTokenizer.from_pretrained(tiny_base)

    def generate(folder):
        names = {}
        exec(loading_snippet(folder, read_identity(folder)), names)
        prompt = torch.tensor([IDS])
        answer = names["model"].generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8)
        return answer[0, len(IDS) :].tolist()

    endless = generate(tmp_path / "known")  # the base's config knows the tokenizer's end
    assert len(endless) == 8
    stop = endless[3]
    model.get_base_model().generation_config.update(top_p=0.5)
    save(tmp_path / "lacking", model, tokenizer, [stop], base=str(tiny_base))
    assert generate(tmp_path / "lacking") == endless[: endless.index(stop) + 1]
    written = json.loads((tmp_path / "lacking" / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["top_p"]) == ([tokenizer.eos_token_id, stop], 0.5)  # the base's own stay


def test_an_adapter_on_a_base_of_the_hub_names_no_path_of_this_machine(tiny_base, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "snapshots" / ("ab" * 20)
    shutil.copytree(tiny_base, snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(snapshot))
    module = QLoRAModule("org/tiny", compute_dtype="fp32")
    module.configure_model()
    module.save_adapter(tmp_path / "first", load_tokenizer("org/tiny"))
    again = QLoRAModule("org/tiny", compute_dtype="fp32", adapter=str(tmp_path / "first"))
    again.configure_model()
    again.save_adapter(tmp_path / "second", load_tokenizer("org/tiny"))
    for folder in ("first", "second"):
        assert contents(tmp_path / folder).keys() >= FILES | TOKENIZER_FILES
        assert not [name for name, content in contents(tmp_path / folder).items() if bytes(tmp_path) in content]


# ---- whole or not at all ---------------------------------------------------------------------------------------------


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


def dying(change, countdown):
    """Let a function that changes a file count down, and die in front of the last change."""

    def change_or_die(*args, **kwargs):
        countdown[0] -= 1
        if countdown[0] == 0:
            raise KilledError
        return change(*args, **kwargs)

    return change_or_die


def test_a_kill_at_any_change_of_the_folder_mixes_no_two_adapters(made, tiny_base, tmp_path):
    """Also behind a link, and whether or not both came with a tokenizer; files of the user's stay."""
    old, new = contents(made[0]), contents(save(tmp_path / "new", make_module(tiny_base, rank=2).model))
    for number in range(1, 100):
        shutil.copytree(made[0], tmp_path / str(number))
        (tmp_path / str(number) / "notes.txt").write_text("mine")
        folder = tmp_path / f"link{number}"
        folder.symlink_to(str(number))
        model, countdown = make_module(tiny_base, rank=2).model, [number]
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KilledError):
            patch.setattr("os.replace", dying(os.replace, countdown))
            patch.setattr("pathlib.Path.unlink", dying(Path.unlink, countdown))
            save(folder, model)
        found = contents(folder)
        assert found.pop("notes.txt") == b"mine"
        assert WEIGHTS not in found or found == old or found.items() >= new.items()
        save(folder, model)
        assert contents(folder).items() >= new.items()
        assert not {"chat_template.jinja", "generation_config.json", ".writing"} & set(os.listdir(folder))
        if countdown[0] > 0:
            break
    assert number > len(new)  # kills in front of each change came before


# ---- read, and rejected ----------------------------------------------------------------------------------------------


def with_tensors(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors, next(iter(tensors)))
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda folder: os.truncate(folder / WEIGHTS, 5),
            r"adapter_model\.safetensors is not a whole safetensors file",
        ),
        (with_tensors(lambda found, name: found.pop(name)), "1 tensors are missing in it and 0 are foreign"),
        (with_tensors(lambda found, name: found.update(more=torch.ones(1))), "0 tensors are missing in it and 1 are"),
        (with_tensors(lambda found, name: found.update({name: torch.ones(3, 128)})), r"has shape \(3, 128\) there"),
        (with_tensors(lambda found, name: found[name][0].fill_(torch.nan)), "is damaged: 128 of 512 values of .* are"),
    ],
)
def test_of_tensors_that_are_damaged_or_do_not_fit_none_is_read(folder, made, damage, sentence):
    before = {name: tensor.detach().clone() for name, tensor in trainable_tensors(made[1]).items()}
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    damage(folder)
    with pytest.raises(UserError, match=sentence):
        fill_adapter(made[1], folder)
    assert same(before, trainable_tensors(made[1]))
