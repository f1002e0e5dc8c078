import pytest

from qlora_lightning.data.chat.templates import load_choice
from qlora_lightning.data.chat.tokenizer import hash_tokenizer, tokenizer_of_base
from qlora_lightning.support.errors import UserError


@pytest.fixture
def folder(families, tmp_path):
    families["qwen25"].save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_the_bases_own_tokenizer_is_of_the_same_revision():
    assert tokenizer_of_base("org/model") == "org/model"
    with_code = {"name": "org/model", "revision": "v1", "trust_remote_code": True}
    assert tokenizer_of_base("org/model", "v1", True) == with_code


def test_a_folder_a_mapping_or_the_object_itself(folder, families):
    text = families["qwen25"].apply_chat_template([{"role": "user", "content": "é"}], tokenize=False)
    for choice in (str(folder), {"name": str(folder)}, families["qwen25"]):
        loaded = load_choice(choice, None)
        assert loaded.encode(text) == families["qwen25"].encode(text)
        assert loaded.chat_template == families["qwen25"].chat_template


def test_a_chosen_template_is_put_on_a_copy(families):
    before = families["qwen25"].chat_template
    assert load_choice(families["qwen25"], "chatml").chat_template != before
    assert families["qwen25"].chat_template == before


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (None, "tokenizer: expected a hub id, a folder or package:NAME, found none"),
        ({"revision": "v1"}, "tokenizer: expected a name, or a mapping with name, revision, trust_remote_code"),
        ({"name": "a", "revison": "v1"}, "found {'name': 'a', 'revison': 'v1'}"),
    ],
)
def test_what_is_no_choice_is_refused(choice, words):
    with pytest.raises(UserError, match=words):
        load_choice(choice, None)


def test_the_hash_tells_contents_apart_without_loading(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_lightning.base.folder.load_tokenizer", lambda **choice: pytest.fail("loaded"))
    template, name = tmp_path / "own.jinja", str(folder)
    template.write_text("a")
    hashes = [hash_tokenizer(name, choice) for choice in (None, "chatml", "llama3", str(template))]
    template.write_text("b")
    hashes.append(hash_tokenizer(name, str(template)))
    for file in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / file).write_text("{}")
        hashes.append(hash_tokenizer(name))
    assert len(set(hashes)) == 8
    assert None not in hashes
    for other in ("README.md", "model.safetensors.index.json"):
        (folder / other).write_text("{}")
    assert hash_tokenizer({"name": name}) == hashes[-1]


def test_an_object_is_hashed_by_what_it_is_now(smol):
    hashes = [hash_tokenizer(smol), hash_tokenizer(smol, "chatml")]
    without = hash_tokenizer(smol, with_template=False)
    smol.chat_template += " "
    hashes.append(hash_tokenizer(smol))
    assert hash_tokenizer(smol, with_template=False) == without
    smol.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    hashes.append(hash_tokenizer(smol))
    assert len({*hashes, without}) == 5


def test_nothing_is_known_of_no_choice():
    assert hash_tokenizer(None) is None
