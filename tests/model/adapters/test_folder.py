"""The adapter folder: what plain PEFT loads, whole or not at all, and rejected if it is damaged."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qlora_lightning import QLoRAModule
from qlora_lightning.base.adapter_folder import read_identity
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


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def save(folder, model, tokenizer=None, stop_ids=(), base="org/base"):
    identity = {"base": base, "quantization": "none", "compute_dtype": "float32"}
    save_adapter_folder(folder, model, tokenizer, identity, stop_ids)


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
    identity = read_identity(tmp_path)
    assert f"```python\n{loading_snippet('.', identity)}\n```" in (tmp_path / "README.md").read_text()
    program = PROGRAM.replace("SNIPPET", loading_snippet(tmp_path, identity)).replace("IDS", str(IDS))
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "logits")], check=True, capture_output=True)
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([IDS])).logits
        torch.testing.assert_close(torch.load(tmp_path / "logits", weights_only=True), ours, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert (model(input_ids=torch.tensor([IDS])).logits - ours).abs().max() > 0.1  # the adapter does something


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


def test_on_a_base_of_the_hub_it_is_saved_without_network_and_names_no_path(tiny_base, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    snapshot = shutil.copytree(tiny_base, tmp_path / "hub" / "snapshots" / ("ab" * 20))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(snapshot))
    tokenizer, start = load_tokenizer("org/tiny"), None
    for folder in (tmp_path / "first", tmp_path / "second"):
        module = QLoRAModule("org/tiny", compute_dtype="fp32", adapter=start)
        module.configure_model()
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            patch.setattr(socket, "socket", refuse)
            patch.setattr(socket, "getaddrinfo", refuse)
            module.save_adapter(folder, tokenizer)
        assert contents(folder).keys() >= FILES | TOKENIZER_FILES
        assert not [name for name, content in contents(folder).items() if bytes(tmp_path) in content]
        start = str(folder)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


# ---- whole or not at all ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("rank", [4, 2])  # only the weights differ, or other files too
def test_a_kill_at_any_change_of_the_folder_mixes_no_two_adapters(tiny_base, tmp_path, rank):
    """Also behind a link; files of the user's stay."""
    save(tmp_path / "old", make_module(tiny_base).model)
    model = make_module(tiny_base, rank=rank).model
    for tensor in trainable_tensors(model).values():
        tensor.data += 1
    save(tmp_path / "new", model)
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    for number in range(1, 100):
        shutil.copytree(tmp_path / "old", tmp_path / str(number))
        (tmp_path / str(number) / "notes.txt").write_text("mine")
        folder, countdown = tmp_path / f"link{number}", [number]
        folder.symlink_to(str(number))
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KilledError):
            patch.setattr("os.replace", dying(os.replace, countdown))
            patch.setattr("pathlib.Path.unlink", dying(Path.unlink, countdown))
            save(folder, model)
        found = contents(folder)
        assert found.pop("notes.txt") == b"mine"
        assert found in (old, new) or (rank == 2 and WEIGHTS not in found)
        save(folder, model)
        assert contents(folder) == {**new, "notes.txt": b"mine"}
        if countdown[0] > 0:
            break
    assert number > len(new)  # kills in front of each change came before


# ---- read, and rejected ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors, name: tensors.pop(name), r"1 tensors differ \(.* is missing there, \(4, 128\) here"),
        (lambda tensors, name: tensors.update({name: torch.ones(3, 128)}), r"is \(3, 128\) there"),
    ],
)
def test_of_tensors_that_do_not_fit_none_is_read(made, tmp_path, change, sentence):
    before = {name: tensor.detach().clone() for name, tensor in trainable_tensors(made[1]).items()}
    folder = shutil.copytree(made[0], tmp_path / "adapter")
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors, next(iter(tensors)))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=sentence):
        fill_adapter(made[1], folder)
    assert same(before, trainable_tensors(made[1]))
