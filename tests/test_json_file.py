import pytest

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import read_json_object


def test_an_object_is_read_also_behind_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"name": "x"}')
    assert read_json_object(tmp_path / "a.json", "Make it again.", {"name!": str}) == {"name": "x"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"name": ', "a.json is not JSON, or it is cut off (Expecting value: line 1 column 10 (char 9))."),
        (b"\xff\xfe{", "a.json is not JSON, or it is cut off ("),
        (100_000 * b"[", "a.json is not JSON, or it is cut off ("),
        (b"[]", "a.json: expected a JSON object, found list."),
        (b'{"name": 3}', "a.json is damaged: name is 3, expected text."),
    ],
)
def test_what_is_wrong_is_told_with_what_to_do(tmp_path, content, words):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json_object(tmp_path / "a.json", "Make it again.", {"name!": str})
    assert words in str(caught.value)
    assert str(caught.value).endswith(" Make it again.")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"a\.json cannot be read: Is a directory\."):
        read_json_object(tmp_path / "a.json", "Make it again.")
