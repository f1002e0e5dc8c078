import copy
import json

import pytest

from qlora_lightning.data.chat.control_tokens import find_stop_ids, find_turn_end
from qlora_lightning.support.errors import UserError


def test_the_tokenizers_own_stop_token(characters):
    assert find_stop_ids(characters) == {125}


def test_those_of_the_generation_config_in_its_folder(characters, tmp_path):
    characters.name_or_path = str(tmp_path)
    for given, expected in ((7, {7, 125}), ([7, 8], {7, 8, 125}), (None, {125})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        assert find_stop_ids(characters) == expected


def test_without_a_generation_config_those_of_the_config(characters, tmp_path):
    characters.name_or_path = str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert find_stop_ids(characters) == {7, 8, 125}
    (tmp_path / "generation_config.json").write_text("{}")
    assert find_stop_ids(characters) == {125}


def test_a_tokenizer_from_nowhere_reads_no_file(characters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    characters.name_or_path = ""
    assert find_stop_ids(characters) == {125}


def test_a_generation_config_that_is_not_json_is_refused_by_name(characters, tmp_path):
    characters.name_or_path = str(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is not JSON"):
        find_stop_ids(characters)


def test_former_stop_ids_stay(characters):
    characters.former_stop_ids = {9}
    assert find_stop_ids(characters) == {9, 125}


def test_the_end_of_a_turn_is_found_by_rendering(families):
    for tokenizer in families.values():
        assert find_turn_end(tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("after", "end"),
    [
        ("<|im_end|>\n<|endoftext|>", "<|im_end|>"),
        (" \n<|endoftext|>", "<|endoftext|>"),
        (" Next:<|im_end|>", "<|im_end|>"),
        ("<think>", "<think>"),  # in the vocabulary, and not special
        ("<think>x<|im_end|>", "<think>"),
        ("<thought><|im_end|>", "<|im_end|>"),  # the first is in no vocabulary: mere text
        ("\n", None),
    ],
)
def test_the_first_control_token_after_an_answer_ends_the_turn(families, after, end):
    tokenizer = copy.deepcopy(families["qwen25"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}" + after + "{% endfor %}"
    assert find_turn_end(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))
