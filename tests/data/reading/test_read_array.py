import json

import pytest

from qlora_lightning.data.rows import readers as module
from qlora_lightning.data.rows.readers import MAX_ROW_BYTES, Cursor, read_array

REST = "; the rest of the file cannot be read"


@pytest.fixture(params=[1, 7, 1 << 18])
def parse(tmp_path, monkeypatch, request):
    """Write a file, read it in chunks of 1, 7 and many bytes, and return (line, values or fault) of each row."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", request.param)

    def parse(content):
        file = tmp_path / "a.json"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [(line, fault if values is None else values) for line, values, fault in read_array(file, Cursor())]

    return parse


def test_each_element_has_the_line_on_which_it_begins(parse):
    rows = parse('\ufeff\n[\n  {"x": 1},\n\n  {\n    "x": "é😀"\n  }, {"x": [{}]}\r\n]\n')
    assert rows == [(3, {"x": 1}), (5, {"x": "é😀"}), (7, {"x": [{}]})]


def test_an_empty_array_has_no_rows(parse):
    assert parse(" [\n] \n") == []


def test_elements_that_are_no_objects_are_named_and_the_next_one_is_read(parse):
    rows = parse('[123, {"x": 1},\n 1.5e3, "a", [1], null, true]')
    assert rows == [
        (1, "element 0 of the array is a number, not an object"),
        (1, {"x": 1}),
        (2, "element 2 of the array is a number, not an object"),
        (2, "element 3 of the array is a string, not an object"),
        (2, "element 4 of the array is an array, not an object"),
        (2, "element 5 of the array is null, not an object"),
        (2, "element 6 of the array is a boolean, not an object"),
    ]


@pytest.mark.parametrize(
    ("text", "line", "fault"),
    [
        ('{"x": }]', 2, "not JSON in element 1 of the array (Expecting value, character 7 of it)"),
        ('{\n"x": 2 "y": 3}]', 3, "not JSON in element 1 of the array (Expecting ',' delimiter, character 10 of it)"),
        ("]", 2, "not JSON in element 1 of the array (Expecting value, character 1 of it)"),
        ('{"x": 2} {"x": 3}]', 2, "expected ',' or ']' after element 1 of the array"),
        ('{"x": 2}\n\n', 4, "expected ',' or ']' after element 1 of the array"),
        ('{"x": 2}]\n{"x": 3}', 3, "more text after the end of the array"),
        ("", 2, "not JSON in element 1 of the array (the file ends in the middle: Expecting value"),
        ('{"x":\n ', 3, "not JSON in element 1 of the array (the file ends in the middle: Expecting value"),
        ('{"x": "a]', 2, "not JSON in element 1 of the array (the file ends in the middle: Unterminated string"),
        (b'{"x": 2},\n{"x": "\xff"}]', 3, "not UTF-8 text: save the file as UTF-8"),
        (b'{"x": 2}\n\xff]', 3, "not UTF-8 text: save the file as UTF-8"),
        (b'{"x": "\xc3', 2, "not UTF-8 text: save the file as UTF-8"),
    ],
)
def test_a_syntax_error_ends_the_file(parse, text, line, fault):
    first, *_, last = parse(b'[{"x": 1},\n' + (text if isinstance(text, bytes) else text.encode()))
    assert first == (1, {"x": 1})
    assert last[0] == line
    assert last[1].startswith(fault)
    assert last[1].endswith(REST)


def test_deep_nesting_and_endless_numbers_are_faults(tmp_path):
    for text in ("[" * 100_000, "9" * 5000):
        (tmp_path / "a.json").write_text(f'[{{"x": {text}}}]')
        ((_, values, fault),) = read_array(tmp_path / "a.json", Cursor())
        assert values is None
        assert fault.startswith("element 0 of the array cannot be read: ")


def test_a_row_that_is_too_long_is_refused_without_reading_the_file_to_its_end(tmp_path):
    (tmp_path / "a.json").write_text(f'[{{"x": 1}}, {{"x": "{"a" * 3 * MAX_ROW_BYTES}"}}]')
    cursor = Cursor()
    rows = read_array(tmp_path / "a.json", cursor)
    assert next(rows) == (1, {"x": 1}, "")
    fault = f"element 1 of the array is longer than 4 MiB: two rows have probably run together{REST}"
    assert next(rows) == (1, None, fault)


def test_a_row_of_nearly_the_longest_length_is_read(tmp_path):
    row = {"x": "a" * (MAX_ROW_BYTES - 100)}
    (tmp_path / "a.json").write_text(json.dumps([row, row]))
    assert [values == row for _, values, _ in read_array(tmp_path / "a.json", Cursor())] == [True, True]
