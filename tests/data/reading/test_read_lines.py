import tracemalloc

import pytest

from qlora_lightning.data.rows.readers import MAX_ROW_BYTES, Cursor, read_lines


@pytest.fixture
def parse(tmp_path):
    """Write a file and return (line, values or fault) of each row."""

    def parse(content):
        file = tmp_path / "a.jsonl"
        file.write_bytes(content)
        return [(line, fault if values is None else values) for line, values, fault in read_lines(file, Cursor())]

    return parse


def test_blank_lines_windows_ends_byte_order_marks_and_line_separators(parse):
    rows = parse(b'\xef\xbb\xbf{"x": 1}\r\n\r\n  \n{"x": "\xe2\x80\xa8"}\n\xef\xbb\xbf{"x": 2}')
    assert rows == [(1, {"x": 1}), (4, {"x": "\u2028"}), (5, {"x": 2})]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"x": }', "not JSON: Expecting value (column 7)"),
        (b"{'x': 1}", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
        (b'{"x": 1} {"x": 2}', "not JSON: Extra data (column 10)"),
        (b'{"x": "a\0"}', "not JSON: NUL byte (column 9)"),
        (b"\0\0\0", "not JSON: NUL byte (column 1)"),
        (b"[1]", "an array, not a JSON object"),
        (b'"s"', "a string, not a JSON object"),
        (b"1.5", "a number, not a JSON object"),
        (b"true", "a boolean, not a JSON object"),
        (b"null", "null, not a JSON object"),
        (b'{"x": "\xff"}', "not UTF-8 text: save the file as UTF-8"),
        (b'{"x": "\xed\xa0\x80"}', "not UTF-8 text: save the file as UTF-8"),  # a surrogate
        (b"[" * 100_000, "not JSON that can be read: maximum recursion depth exceeded while decoding a JSON array "),
        (b"[" + b"9" * 5000 + b"]", "not JSON that can be read: Exceeds the limit (4300 digits) for integer string "),
    ],
)
def test_a_bad_line_is_named_and_the_next_one_is_read(parse, line, fault):
    (first, found), last = parse(b"\n" + line + b'\r\n{"x": 1}\n')
    assert first == 2
    assert found.startswith(fault)
    assert last == (3, {"x": 1})


@pytest.mark.parametrize(
    "line", [b'{"x": "a', b'{"x": 1', b'{"x": ', b'{"x": 1,', b"{", b'{"x": {"y": 1}', b'{"x": "\\', b'{"x": "\xc3']
)
def test_a_last_line_that_is_cut_off_is_said_to_end_in_the_middle(parse, line):
    good, (number, fault) = parse(b'{"x": 1}\n' + line)
    assert good == (1, {"x": 1})
    assert number == 2
    assert "the line ends in the middle" in fault


def test_a_row_that_is_too_long_is_passed_over_and_not_held(parse):
    text = b'{"x": 1}\n{"x": "' + b"a" * 30_000_000 + b'"}\n{"x": 2}\n{"x": "' + b"a" * 5_000_000
    tracemalloc.start()
    rows = parse(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    too_long = "longer than 4 MiB: two rows have probably run together"
    assert rows == [(1, {"x": 1}), (2, too_long), (3, {"x": 2}), (4, too_long)]
    assert peak < 3 * MAX_ROW_BYTES


def test_a_row_of_just_the_longest_length_is_read(parse):
    filling = b"a" * (MAX_ROW_BYTES - len(b'{"x": ""}\n'))
    assert [line for line, _ in parse(b'{"x": "' + filling + b'"}\n')] == [1]
    assert parse(b'{"x": "' + filling + b'a"}\n{}')[0][1].startswith("longer than 4 MiB")
