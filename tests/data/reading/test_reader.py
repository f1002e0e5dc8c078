import bz2
import gzip
import itertools
import json
import lzma
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.readers import Row, RowReader, fingerprint, read_rows
from qlora_lightning.data.rows.sources import find_sources
from qlora_lightning.support.errors import UserError

ROWS = [{"x": str(number), "text": "é\n,{" * number} for number in range(7)]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def only_source(name):
    (source,) = find_sources(name, "train")
    return source


def compress(data, suffix):
    """Compress bytes as a file of that suffix is."""
    if suffix == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](data)


def content(kind):
    """The seven rows as a file of that kind; where the kind knows lines, with a bad row in the middle."""
    lines = [json.dumps(row) for row in ROWS]
    if kind == ".jsonl":
        return "\n".join([*lines[:3], "", "[1]", *lines[3:]]).encode()
    if kind == ".json":
        elements = ",\n\n ".join([*lines[:3], "12", *lines[3:]])
        return f"\ufeff[{elements}\n]\n".encode()
    if kind == ".csv":
        records = [f'{row["x"]},"{row["text"]}"' for row in ROWS]
        return "\r\n".join(["\ufeffx,text", *records[:3], "", "a,b,c", *records[3:]]).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


def check_every_position(source):
    """Whatever the number of rows read, a second reader goes on where the first one stood; return all rows."""
    everything = list(RowReader(source))
    for count in range(len(everything) + 1):
        reader = RowReader(source)
        begin = list(itertools.islice(reader, count))
        position = json.loads(json.dumps(reader.position()))
        assert begin + list(RowReader(source, position)) == everything
        assert begin + list(reader) == everything
    return everything


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_is_read_and_taken_up_again_at_every_row(kind, suffix):
    Path(f"a{kind}{suffix}").write_bytes(compress(content(kind), suffix))
    rows = check_every_position(only_source(f"a{kind}{suffix}"))
    assert [row.values for row in rows if isinstance(row, Row)] == ROWS
    if kind != ".parquet":
        assert isinstance(rows[3], BadRow)


def test_a_json_file_of_lines_is_taken_up_again_at_every_row():
    Path("a.json").write_bytes(content(".jsonl"))
    assert len(check_every_position(only_source("a.json"))) == 8


def test_a_folder_is_taken_up_again_at_every_row():
    Path("d").mkdir()
    for kind in (".jsonl", ".json", ".csv", ".parquet"):
        Path("d", f"a{kind}").write_bytes(content(kind))
    rows = check_every_position(only_source("d"))
    assert len(rows) == 8 + 8 + 8 + 7
    assert [row.where for row in rows[::8]] == ["d/a.csv:2", "d/a.json:1", "d/a.jsonl:1", "d/a.parquet:1"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", '[{"x": 1}, {"x": '), ("a.csv", 'x\n1\n"2\n'), ("a.json", '[{"x": 1}] {"x": 2}'), ("a.jsonl", "{}\n{")],
)
def test_what_follows_a_fault_that_ends_a_file_is_not_read_after_going_on_either(name, text):
    Path(name).write_text(text)
    Path("b.jsonl").write_text('{"x": 3}\n')
    rows = check_every_position(only_source("[ab].*"))
    assert [type(row) for row in rows] == [Row, BadRow, Row]


def test_positions_need_no_parsing_of_what_was_read():
    Path("a.jsonl").write_text('{"x": 1}\n{"x": 2}\n{"x": 3}\n')
    reader = RowReader(only_source("a.jsonl"))
    next(iter(reader))
    assert reader.position() == {"file": 0, "offset": 9, "line": 2, "count": 1}
    Path("a.jsonl").write_text('XXXXXXXX\n{"x": 2}\n{"x": 3}\n')
    assert [row.where for row in RowReader(reader.source, reader.position())] == ["a.jsonl:2", "a.jsonl:3"]


def test_a_file_that_became_shorter_is_noticed():
    Path("a.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    reader = RowReader(only_source("a.jsonl"))
    list(itertools.islice(reader, 1))
    Path("a.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"a.jsonl ends before byte 9.*changed"):
        list(reader)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_memory_does_not_grow_with_the_file(name):
    row = {"x": "y" * 100_000}
    lines = [json.dumps(row)] * 300
    texts = {"a.json": "[" + ",\n".join(lines) + "]", "a.csv": "\n".join(["x", *[row["x"]] * 300])}
    text = texts.get(name, "\n".join(lines))
    Path(name).write_bytes(compress(text.encode(), Path(name).suffix if name.endswith(".gz") else ""))
    source = only_source(name)
    tracemalloc.start()
    assert sum(row.values["x"] == "y" * 100_000 for row in RowReader(source)) == 300  # 30 MB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6_000_000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n \n"),
        ("a.json", "[ ]"),
        ("a.json", "\n"),
        ("a.csv", "x,y\n\n"),
    ],
)
def test_a_file_without_rows_is_refused(name, text):
    Path(name).write_text(text)
    with pytest.raises(UserError, match=f"{name} holds no rows"):
        read_rows(name)


def test_parquet_without_rows_and_a_compressed_empty_file_are_refused():
    pq.write_table(pa.table({"x": pa.array([], "string")}), "a.parquet")
    Path("a.jsonl.gz").write_bytes(gzip.compress(b""))
    for name in ("a.parquet", "a.jsonl.gz"):
        with pytest.raises(UserError, match=f"{name} holds no rows"):
            read_rows(name)


def test_bad_lines_are_an_error_or_collected_on_request():
    Path("a.jsonl").write_text('{"x": 1}\n3\n')
    bad = []
    assert [row.values for row in read_rows("a.jsonl", bad)] == [{"x": 1}]
    assert [row.where for row in bad] == ["a.jsonl:2"]
    with pytest.raises(UserError, match=r"1 row cannot be used:\n  a.jsonl:2: a number"):
        read_rows("a.jsonl")


def test_several_sources_are_read_one_after_the_other():
    Path("a.jsonl").write_text('{"x": 1}\n')
    Path("b.csv").write_text("x\n2\n")
    rows = read_rows([{"path": "b.csv", "weight": 2}, {"path": "a.jsonl", "weight": 1}])
    assert [(row.values["x"], row.where) for row in rows] == [("2", "b.csv:2"), (1, "a.jsonl:1")]


def test_the_fingerprint_is_that_of_bytes_and_kinds_not_of_names():
    def of(name):
        return fingerprint(only_source(name))

    Path("d").mkdir()
    Path("d/a.jsonl").write_text('{"x": 1}\n')
    Path("b.jsonl").write_text('{"x": 1}\n')
    Path("b.json").write_text('{"x": 1}\n')
    before = of("d")
    assert before == of("d/a.jsonl") == of("b.jsonl")
    assert before != of("b.json")
    Path("d/a.jsonl").write_text('{"x": 2}\n')
    changed = of("d")
    assert changed != before
    Path("d/b.jsonl").write_text('{"x": 2}\n')
    assert of("d") != changed
