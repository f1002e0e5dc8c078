import json

from qlora_lightning.data.stops import find_stop_ids


def test_the_tokenizers_own_stop_token(characters):
    assert find_stop_ids(characters) == {125}


def test_those_of_the_generation_config_in_its_folder(characters, tmp_path):
    characters.name_or_path = str(tmp_path)
    for given, expected in ((7, {7, 125}), ([7, 8], {7, 8, 125}), (None, {125})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        assert find_stop_ids(characters) == expected
