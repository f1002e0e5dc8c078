import pytest

from qlora_lightning.base.folder import read_generation_config
from qlora_lightning.support.errors import UserError


def test_it_is_read(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2], "more": "x"}')
    assert read_generation_config(tmp_path / "generation_config.json") == {"eos_token_id": [1, 2], "more": "x"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"eos_token_id": [1', "is not JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"eos_token_id": "x"}', 'eos_token_id is "x", expected a whole number or a list'),
        ('{"eos_token_id": ["x"]}', r'eos_token_id\[0\] is "x"'),
    ],
)
def test_a_damaged_one_is_refused(tmp_path, text, words):
    file = tmp_path / "generation_config.json"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"{words}.*[Mm]end or delete it"):
        read_generation_config(file)
