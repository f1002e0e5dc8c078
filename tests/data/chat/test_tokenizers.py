import pytest

from qlora_lightning.data.chat.tokenizers import (
    hash_choice,
    hash_tokenizer,
    hash_tokenizer_files,
    load_choice,
    tokenizer_of_base,
)
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
    def load(*arguments, **settings):
        raise AssertionError("loaded")

    monkeypatch.setattr("qlora_lightning.base.folder.load_tokenizer", load)
    template = tmp_path / "own.jinja"
    template.write_text("a")
    hashes = [hash_choice(str(folder), choice) for choice in (None, "chatml", "llama3", str(template))]
    template.write_text("b")
    hashes.append(hash_choice(str(folder), str(template)))
    (folder / "tokenizer_config.json").write_text("{}")
    hashes.append(hash_choice(str(folder), None))
    assert len(set(hashes)) == 6
    assert None not in hashes
    assert hash_choice({"name": str(folder)}, None) == hashes[-1]


def test_an_object_is_hashed_by_what_it_is_now(smol, tmp_path):
    before = hash_choice(smol, None)
    assert hash_choice(smol, "chatml") != before
    smol.chat_template += " "
    assert hash_choice(smol, None) != before


def test_nothing_is_known_of_no_choice_of_python_code_and_of_a_missing_template(characters, folder):
    assert hash_choice(None, None) is None
    assert hash_choice(characters, None) is None
    assert hash_choice(str(folder), "missing.jinja") is None


@pytest.mark.parametrize(
    ("file", "counts"),
    [("tokenizer.json", True), ("chat_template.jinja", True), ("generation_config.json", True), ("README.md", False)],
)
def test_of_a_folder_the_tokenizers_files_count(tmp_path, file, counts):
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    before = hash_tokenizer_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("other weights")
    assert hash_tokenizer_files(tmp_path) == before
    (tmp_path / file).write_text("{ }")
    assert (hash_tokenizer_files(tmp_path) != before) is counts


def test_a_loaded_tokenizer_is_hashed_with_its_template(smol, characters):
    before = hash_tokenizer(smol)
    assert hash_tokenizer(smol) == before
    smol.chat_template += " "
    changed = hash_tokenizer(smol)
    smol.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    assert len({before, changed, hash_tokenizer(smol)}) == 3
    assert hash_tokenizer(characters) is None  # Python code may do anything
