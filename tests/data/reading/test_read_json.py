import pytest

from qlora_lightning.data.rows.readers import Cursor, read_json
from qlora_lightning.support.errors import UserError


@pytest.fixture
def parse(tmp_path):
    """Write a file and return (line, values or fault) of each row."""

    def parse(text):
        file = tmp_path / "a.json"
        file.write_text(text)
        return [(line, fault if values is None else values) for line, values, fault in read_json(file, Cursor())]

    return parse


@pytest.mark.parametrize("begin", ["", "\ufeff", "\n\n"])
def test_an_array_and_lines_are_told_apart(parse, begin):
    line = 1 + begin.count("\n")
    assert parse(begin + '[{"x": 1},\n{"x": 2}]') == [(line, {"x": 1}), (line + 1, {"x": 2})]
    assert parse(begin + '{"x": 1}\n{"x": 2}') == [(line, {"x": 1}), (line + 1, {"x": 2})]
    assert parse(begin + '{"x": [1]}') == [(line, {"x": [1]})]


@pytest.mark.parametrize(
    "text", ['{\n"data": []\n}', '{"data": [\n{"x": 1}]}\n', '{"data": [' + '\n{"x": 1},' * 600_000]
)
def test_one_object_over_several_lines_is_refused(parse, text):
    with pytest.raises(UserError, match=r"a.json holds one JSON object over several lines: expected an array"):
        parse(text)


def test_a_bad_first_line_is_a_bad_row(parse):
    (number, fault), good = parse('{"x": \n{"x": 2}\n')
    assert number == 1
    assert fault.startswith("not JSON: the line ends in the middle of the row")
    assert good == (2, {"x": 2})
