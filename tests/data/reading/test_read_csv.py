import tracemalloc

import pytest

from qlora_lightning.data.rows.readers import MAX_ROW_BYTES, Cursor, read_csv
from qlora_lightning.support.errors import UserError

REST = "; the rest of the file cannot be read"


@pytest.fixture
def parse(tmp_path):
    """Write a file and return (line, values or fault) of each row."""

    def parse(content):
        file = tmp_path / "a.csv"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [(line, fault if values is None else values) for line, values, fault in read_csv(file, Cursor())]

    return parse


def test_quoted_fields_over_several_lines_blank_lines_and_a_byte_order_mark(parse):
    rows = parse('\ufeffx,"the, y"\r\n1,"a ""b"",\nc"\r\n\r\n2,\n  \n"",5" pipe')
    assert rows == [
        (2, {"x": "1", "the, y": 'a "b",\nc'}),
        (5, {"x": "2", "the, y": ""}),
        (7, {"x": "", "the, y": '5" pipe'}),
    ]


def test_too_few_and_too_many_fields_are_named_with_the_first_line_of_the_row(parse):
    assert parse('x,y\n"a\nb"\n1,2,3\n1,2\n') == [
        (2, "1 fields, expected 2 (x, y)"),
        (4, "3 fields, expected 2 (x, y): a comma inside a field needs quotes around it"),
        (5, {"x": "1", "y": "2"}),
    ]


def test_bytes_that_are_no_text_are_faults_of_their_row_alone(parse):
    assert parse(b'x,y\n1,"\xff\n"\n2,\0\n3,3\n') == [
        (2, "not UTF-8 text: save the file as UTF-8"),
        (4, "NUL bytes in the row: it is not text"),
        (5, {"x": "3", "y": "3"}),
    ]


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ('1,"a\n3,3\n', "not CSV: a quote that opens in this row is never closed"),
        ('1,"a "b" c"\n3,3\n', "not CSV: ',' expected after '\"'"),
    ],
)
def test_a_fault_of_quoting_ends_the_file(parse, record, fault):
    good, (line, found) = parse(f"x,y\n0,0\n{record}")
    assert good == (2, {"x": "0", "y": "0"})
    assert line == 3
    assert found == f"{fault} (a quote inside a quoted field is written twice){REST}"


@pytest.mark.parametrize("long", ["a" * 30_000_000, '"a\n,' + "b," * 3_000_000 + '\n"'])
def test_a_row_that_is_too_long_is_passed_over_and_not_held(parse, long):
    text = f"x,y\n1,1\n2,{long}\n3,3\n".encode()
    tracemalloc.start()
    rows = parse(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == [
        (2, {"x": "1", "y": "1"}),
        (3, "longer than 4 MiB: two rows have probably run together"),
        (4 + long.count("\n"), {"x": "3", "y": "3"}),
    ]
    assert peak < 10 * MAX_ROW_BYTES  # the csv module keeps a field in 4 bytes a character


def test_a_field_longer_than_the_csv_module_takes_by_itself_is_read(parse):
    ((line, values),) = parse("x\n" + "a" * 200_000)
    assert line == 2
    assert values == {"x": "a" * 200_000}


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (",x,y", "a.csv:1: column 1 has no name in the header: name it, or remove the column."),
        ("x,y, ", "a.csv:1: column 3 has no name"),
        ("x,y,x", "a.csv:1: the header names 'x' twice"),
        ("\n\nx;y", "a.csv:3: the header is separated by ';': expected commas."),
        ("x\ty", "a.csv:1: the header is separated by '\\t': expected commas."),
        (b"\xff\xfex\0", "a.csv:1: not UTF-8 text"),
        ('x,"y', "a.csv:1: not CSV: a quote that opens in this row is never closed"),
        ("\n", "a.csv:1: expected a header, found no text."),
    ],
)
def test_a_header_that_is_none_is_refused(parse, header, fault):
    with pytest.raises(UserError) as error:
        parse(header if isinstance(header, bytes) else header + "\n")
    assert fault in str(error.value)
