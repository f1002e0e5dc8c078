from pathlib import Path

import pytest

from qlora_lightning.data.reader import read_rows
from qlora_lightning.errors import UserError


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(name):
    with pytest.raises(UserError) as error:
        read_rows(name)
    return str(error.value)


def test_json_lines_with_blank_lines_windows_ends_and_a_byte_order_mark():
    Path("a.jsonl").write_bytes(b'\xef\xbb\xbf{"x": 1}\r\n\r\n  \n{"x": "\xe2\x80\xa8"}')
    rows = read_rows("a.jsonl")
    assert [(row.values, row.where) for row in rows] == [({"x": 1}, "a.jsonl:1"), ({"x": "\u2028"}, "a.jsonl:4")]


def test_an_array_gives_each_element_its_line():
    Path("a.json").write_text('[\n  {"x": 1},\n\n  {\n    "x": 2\n  }, {"x": 3}\n]\n')
    assert [(row.values["x"], row.line) for row in read_rows("a.json")] == [(1, 2), (2, 4), (3, 6)]


def test_a_json_file_may_hold_json_lines():
    Path("a.json").write_text('{"x": 1}\n{"x": 2}\n')
    assert [row.where for row in read_rows("a.json")] == ["a.json:1", "a.json:2"]


def test_a_missing_file_names_the_folder_and_the_nearest_name():
    Path("train.jsonl").touch()
    message = refusal("trian.jsonl")
    assert "trian.jsonl does not exist" in message
    assert "relative to the current folder" in message
    assert str(Path.cwd()) in message
    assert "did you mean train.jsonl?" in message
    assert "there is no folder data either" in refusal("data/train.jsonl")


def test_a_folder_another_kind_and_an_empty_file_are_refused():
    Path("folder").mkdir()
    Path("a.csv").touch()
    Path("a.jsonl").write_text("\n \n")
    Path("b.json").write_text("[ ]")
    assert "folder is a folder" in refusal("folder")
    assert "ends in '.csv'" in refusal("a.csv")
    assert "a.jsonl holds no rows" in refusal("a.jsonl")
    assert "b.json holds no rows" in refusal("b.json")


def test_bad_lines_are_all_named():
    Path("a.jsonl").write_bytes(b'{"x": 1}\n{"x": \n[1]\n"s"\n{"x": "\xff"}\nnull\n')
    message = refusal("a.jsonl")
    assert message.startswith("5 rows cannot be used:")
    assert "a.jsonl:2: not JSON: Expecting value" in message
    assert "a.jsonl:3: an array, not a JSON object" in message
    assert "a.jsonl:4: a string, not a JSON object" in message
    assert "a.jsonl:5: not UTF-8" in message
    assert "a.jsonl:6: null, not a JSON object" in message


def test_bad_lines_are_collected_on_request():
    Path("a.jsonl").write_text('{"x": 1}\n3\n')
    bad = []
    assert len(read_rows("a.jsonl", bad)) == 1
    assert [row.where for row in bad] == ["a.jsonl:2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"x": 1},\n 7]', "a.json:2: element 1 of the array is a number, not an object"),
        ('[{"x": 1},\n {"x": }]', "a.json:2: not JSON in element 1 of the array"),
        ('[{"x": 1}\n {"x": 2}]', "a.json:2: expected ',' or ']' after element 0"),
        ('[{"x": 1}]\n{"x": 2}', "a.json:1: more text after the end of the array"),
        ('[{"x": 1},\n', "a.json:2: not JSON in element 1"),
        ('{\n"data": []\n}', "a.json holds one JSON object"),
    ],
)
def test_faults_of_an_array(text, expected):
    Path("a.json").write_text(text)
    assert expected in refusal("a.json")


def test_an_array_that_is_not_utf8_names_the_line():
    Path("a.json").write_bytes(b'[\n{"x": "\xff"}]')
    assert "a.json:2: not UTF-8" in refusal("a.json")
