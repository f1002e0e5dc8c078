"""Files as they come: every kind, compression and encoding, each row with its place."""

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_lightning.data.rows import readers
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.readers import Row, hash_source, read_rows
from qlora_lightning.data.rows.sources import Source, find_sources
from qlora_lightning.support.errors import UserError

ROWS = [{"x": str(number), "text": "é\n,{" * number} for number in range(7)]
KINDS = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def source(value, **entry):
    (found,) = find_sources({"path": value, **entry}, "train")
    return found


def read(content, name="a.jsonl", **entry):
    """Write a file and return (line, values or reason) of each row."""
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = read_rows(source(name, **entry))
    return [(row.line, row.values) if isinstance(row, Row) else tuple(row) for row in rows]


def values(value, **entry):
    return [row.values for row in read_rows(source(value, **entry))]


def refusal(content, name="a.jsonl", **entry):
    with pytest.raises(UserError) as error:
        read(content, name, **entry)
    return str(error.value)


def compress(data, suffix):
    """Compress bytes as a file of that suffix is."""
    if suffix == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](data)


def content(kind):
    """The seven rows as a file of that kind; where the kind is text, with a bad row in the middle."""
    lines = [json.dumps(row) for row in ROWS]
    if kind == ".jsonl":
        return "\n".join([*lines[:3], "", "[1]", *lines[3:]]).encode()
    if kind == ".json":
        elements = ",\n\n ".join([*lines[:3], "12", *lines[3:]])
        return f"\ufeff\n[{elements}\n]\n".encode()
    if kind in (".csv", ".tsv"):
        mark = "," if kind == ".csv" else "\t"
        records = [f'{row["x"]}{mark}"{row["text"]}"' for row in ROWS]
        return "\r\n".join([f"\ufeffx{mark}text", *records[:3], "", mark.join("abc"), *records[3:]]).encode()
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(ROWS)
    if kind == ".parquet":
        pq.write_table(table, sink, row_group_size=3)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("kind", "suffix"), [(kind, "") for kind in KINDS] + [(".jsonl", each) for each in (".gz", ".bz2", ".xz", ".zst")]
)
def test_every_kind_is_read(kind, suffix):
    Path(f"a{kind}{suffix}").write_bytes(compress(content(kind), suffix))
    rows = list(read_rows(source(f"a{kind}{suffix}")))
    assert [row.values for row in rows if isinstance(row, Row)] == ROWS
    assert isinstance(rows[3], BadRow) == (kind not in (".parquet", ".arrow"))


def test_a_folder_is_read_in_the_order_of_its_files_or_the_first_rows_of_it():
    Path("d").mkdir()
    for kind in KINDS:
        Path("d", f"a{kind}").write_bytes(content(kind))
    Path("d/b.json").write_bytes(content(".jsonl"))  # lines under the other name
    rows = list(read_rows(source("d")))
    first = ["d/a.arrow:1", "d/a.csv:2", "d/a.json:1", "d/a.jsonl:1", "d/a.parquet:1", "d/a.tsv:2", "d/b.json:1"]
    assert [row.where for row in rows if isinstance(row, Row) and row.values["x"] == "0"] == first
    assert list(read_rows(source("d", rows=17))) == rows[:17]
    assert list(read_rows(source("d", rows=7))) == rows[:7]
    assert list(read_rows(source("d", rows=1000))) == rows


def test_a_url_is_read_as_a_file_is():
    for name in ("a.jsonl.gz", "a.csv.gz", "a.parquet"):
        kind = Path(name.removesuffix(".gz")).suffix
        with fsspec.open(f"memory://files/{name}", "wb", compression="infer") as file:
            file.write(content(kind))
        rows = list(read_rows(source(f"memory://files/{name}")))
        assert [row.values for row in rows if isinstance(row, Row)] == ROWS
        assert len(list(read_rows(source(f"memory://files/*{name[1:]}")))) == len(rows)
    assert len(list(read_rows(source("memory://files")))) == 3 * 7 + 2
    with pytest.raises(UserError, match=r"memory://nowhere/a.jsonl cannot be read"):
        values("memory://nowhere/a.jsonl")
    assert "decompress it" in refusal(gzip.compress(content(".parquet")), "a.parquet.gz")


def test_what_save_to_disk_wrote_is_read_without_what_datasets_keeps_beside_it():
    import datasets

    datasets.disable_progress_bars()
    saved = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2]))
    saved.save_to_disk("both", num_shards={"train": 2, "test": 1})
    Path("both/train/cache-1.arrow").write_bytes(content(".arrow"))
    assert [row.values for row in read_rows(source("both"))] == ROWS
    assert values("both", split="test") == ROWS[:2]
    assert values("both/train") == ROWS
    with pytest.raises(UserError, match=r"^data.val: both has no split 'validation', expected one of train, test\.$"):
        find_sources("both", "val")
    with pytest.raises(UserError, match=r"no split 'tets', expected one of train, test. Did you mean 'test'\?"):
        find_sources({"path": "both", "split": "tets"}, "val")


# JSON


def test_blank_lines_windows_ends_byte_order_marks_and_line_separators():
    rows = read(b'\xef\xbb\xbf{"x": 1}\r\n\r\n  \n{"x": "\xe2\x80\xa8"}\n\xef\xbb\xbf{"x": 2}')
    assert rows == [(1, {"x": 1}), (4, {"x": "\u2028"}), (5, {"x": 2})]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"x": }', "not JSON: Expecting value: line 1 column 7"),
        (b'{"x": "a\0"}', "not JSON: Invalid control character"),
        (b"[1]", "list, expected a JSON object"),
        (b"null", "null, expected a JSON object"),
        (b'{"x": {"a": 1, "b": 2, "a": 3}}', "not JSON: the key 'a' is twice in one object"),
        (b'{"x": "\xff"}', "not UTF-8 text: save the file as UTF-8, or name its encoding, as in `encoding: latin-1`"),
        (b'{"x": "\xed\xa0\x80"}', "not UTF-8 text"),  # a surrogate
        (b'{"x": ' + b"[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit (4300 digits) for integer"),
    ],
)
def test_a_bad_line_is_named_and_the_next_one_is_read(line, fault):
    _, (where, found), last = read(b'{"x": 0}\n' + line + b'\r\n{"x": 1}\n')
    assert where == "a.jsonl:2"
    assert found.startswith(fault)
    assert last == (3, {"x": 1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'[{"x": 1},\n{"x": }]', "a.json is not a JSON array: not JSON: Expecting value: line 2 column 7"),
        (b'[{"x": 1}]\n{"x": 2}', "a.json is not a JSON array: not JSON: Extra data: line 2 column 1"),
        (b'[{"x": "\xff"}]', "a.json is not a JSON array: not UTF-8 text"),
        (b'[{"x": 1},\n{"x": [{"y": 1, "y": 2}]}, {}]', "the key 'y' is twice in one object"),
        (b'[{"x": "' + b"y" * 1000 + b'"}]', "convert it to .jsonl"),
    ],
)
def test_an_array_is_refused_as_a_whole(text, said, monkeypatch):
    monkeypatch.setattr(readers, "MAX_WHOLE", 1000)
    assert said in refusal(text, "a.json")


@pytest.mark.parametrize(
    "text",
    [
        '{"x": {"0": "a", "1": "b"}, "y": {"0": "c", "1": "d"}}',  # as DataFrame.to_json() writes it
        json.dumps({"x": "a", "y": "b"}, indent=2),
        '{ "x": "a",\n  "y": "b" }\n{ "x": "c",\n  "y": "d" }\n',
        '{"data": [\n{"x": "a"},\n{"x": "b"}]}',
    ],
)
def test_a_table_and_objects_over_several_lines_are_refused_as_a_whole(text):
    for begin in ("", "\ufeff\n"):
        found = refusal(begin + text, "a.json")
        assert "a.json: expected one JSON object per line or an array of objects, found" in found
    assert read('{"x": {"a": "0"}, "y": {}}\n{\n') == [  # nested rows, and a bad line behind the first
        (1, {"x": {"a": "0"}, "y": {}}),
        ("a.jsonl:2", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ]


# CSV


def test_quoted_fields_over_several_lines_and_blank_lines():
    rows = read('x,"the, y"\r\n1,"a ""b"",\nc"\r\n\r\n2,\n\n"",5" pipe', "a.csv")
    assert rows == [
        (2, {"x": "1", "the, y": 'a "b",\nc'}),
        (4, {"x": "2", "the, y": ""}),
        (6, {"x": "", "the, y": '5" pipe'}),
    ]


def test_the_delimiter_is_a_comma_or_a_tab_or_named():
    row = {"question": "Why, oh; why", "answer": "So."}
    for name, mark, named in (("a.csv", ",", {}), ("a.tsv", "\t", {}), ("a.csv", ";", {"delimiter": ";"})):
        assert read(f'question{mark}answer\n"Why, oh; why"{mark}So.\n', name, **named) == [(2, row)]
    assert read("x,y\tz\n1\t2\n", "b.csv", delimiter="\\t") == [(2, {"x,y": "1", "z": "2"})]


def test_rows_of_another_length_and_bytes_that_are_no_text_are_faults_of_their_row_alone():
    assert read(b'x,y\n"a\nb"\n1,2,3\n1,"\xff\n"\n3,3\n', "a.csv") == [
        ("a.csv:2", "more or fewer fields than the header (x, y): quote a delimiter inside a field"),
        ("a.csv:4", "more or fewer fields than the header (x, y): quote a delimiter inside a field"),
        ("a.csv:5", "not UTF-8 text: save the file as UTF-8, or name its encoding, as in `encoding: latin-1`"),
        (7, {"x": "3", "y": "3"}),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('x,y\n0,0\n1,"a\n3,3\n', "a.csv:3: a quote that opens in this row is never closed"),
        ('x,y\n0,0\n1,"a "b" c"\n3,3\n', "a.csv:3: ',' expected after '\"'"),
        ("x,y,x\n", "a.csv:1: the header names a column twice, or one has no name: x, y, x"),
        ("x,y, \nWhy?,So,\n", "a.csv:1: the header names a column twice, or one has no name"),
        (b"x,\xff\n", "a.csv:1: not UTF-8 text"),
    ],
)
def test_a_csv_file_whose_rows_cannot_be_told_is_refused(text, said):
    assert said in refusal(text, "a.csv")


def test_the_index_that_pandas_writes_is_left_out():
    assert read(",x\n0,a\n17,b\n", "a.csv") == [(2, {"x": "a"}), (3, {"x": "b"})]


# Encodings, tables, memory, the whole


@pytest.mark.parametrize(("name", "encoding"), [("a.jsonl", "latin-1"), ("a.json", "utf-16"), ("a.csv", "utf-16")])
def test_an_encoding_can_be_named(name, encoding):
    rows = [{"x": "é" * number, "y": "Ä,\n"} for number in range(1, 5)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    records = "\n".join(["x,y", *(f'{row["x"]},"{row["y"]}"' for row in rows)])
    text = {"a.jsonl": "\n".join(lines), "a.json": f"[{','.join(lines)}]", "a.csv": records}[name]
    Path(name).write_bytes(text.encode(encoding))
    assert [row.values for row in read_rows(source(name, encoding=encoding))] == rows
    assert "encoding: latin-1" in refusal(b"x\0y", name, encoding="utf-16")


def test_keys_that_arrow_fills_in_are_left_out():
    """Every struct of a column has the keys of all; a null inside would teach the model to write it."""
    rows = [{"call": {"city": "Rome"}, "n": None}, {"call": {"day": "Monday", "list": [{"a": 1}, {"b": 2}]}, "n": 1}]
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    assert values("a.parquet") == rows
    with pa.ipc.new_file("a.arrow", pa.Table.from_pylist(rows).schema) as writer:  # as Feather and polars write it
        writer.write_table(pa.Table.from_pylist(rows))
    assert [row.values for row in read_rows(source("a.arrow"))] == rows


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv", "a.parquet"])
def test_memory_does_not_grow_with_the_file(name):
    row = {"x": "y" * 10_000}
    text = "\n".join(["x", *[row["x"]] * 1000] if name == "a.csv" else [json.dumps(row)] * 1000)
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist([row] * 1000), name, compression="none", row_group_size=100)
    else:
        Path(name).write_bytes(compress(text.encode(), ".gz" if name.endswith(".gz") else ""))
    del text
    tracemalloc.start()
    assert sum(found.values["x"] == row["x"] for found in read_rows(source(name))) == 1000  # 10 MB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6_000_000


@pytest.mark.parametrize("kind", ["parquet", "parquet of Arrow's dictionaries", "arrow"])
def test_memory_does_not_grow_with_the_uses_of_a_value(kind):
    """A dictionary holds it once: a file of few KB may stand for many GB."""
    value, name = "y" * 2_000_000, f"a.{kind.partition(' ')[0]}"
    table = pa.table({"x": pa.DictionaryArray.from_arrays(pa.array([0] * 128, pa.int32()), pa.array([value]))})
    if kind == "arrow":
        with pa.ipc.new_stream(name, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, name, store_schema=kind != "parquet")
    usual, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        assert sum(found.values["x"] == value for found in read_rows(source(name))) == 128  # 256 MB
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert peak + pool.max_memory() < 64_000_000


def test_a_long_row_of_a_table_is_a_bad_row_with_its_number(monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 1_000_000)
    rows = [{"x": {"y": "z" * size}} for size in (1, 2, 3, 4, 5, 2_000_000, 6)]
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    found = list(read_rows(source("a.parquet")))
    assert found.pop(5) == BadRow("a.parquet:6", "a row of more than 1 MB, the most that is read")
    assert [row.values for row in found] == rows[:5] + rows[6:]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_cut_off_or_something_else_is_named(name):
    whole = content(".parquet") if name == "a.parquet" else compress(content(".jsonl") * 1000, Path(name).suffix)
    assert f"{name} cannot be read" in refusal(whole[: len(whole) // 2], name)
    assert f"{name} cannot be read" in refusal(b'{"x": 1}\n' * 10, name)


def test_the_fingerprint_is_that_of_bytes_kinds_and_how_they_are_read_not_of_names():
    Path("d").mkdir()
    for name in ("d/a.jsonl", "b.jsonl", "b.json"):
        Path(name).write_text('{"x": 1}\n')
    before = hash_source(source("d"))
    assert before == hash_source(source("b.jsonl"))
    others = [source("b.json"), source("d", rows=1), source("d", encoding="latin-1"), source("d", delimiter=";")]
    assert before not in map(hash_source, others)
    Path("d/a.jsonl").write_text('{"x": 2}\n')
    assert before != hash_source(source("d"))


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Write a folder that `datasets` reads as it reads a data set of the hub, without a network; gives its rows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # The environment may have been read before the session's fixture set it.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = [{"x": f"row {number}", "messages": [{"role": "user", "content": "é"}]} for number in range(300)]
    Path("org/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), "org/data/train-0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:2]), "org/data/test-0.parquet")
    datasets.disable_progress_bars()
    yield rows
    datasets.enable_progress_bars()


def test_rows_of_the_hub_are_numbered(hub):
    rows = list(read_rows(Source("org/data", split="train")))
    assert [row.values for row in rows] == hub
    assert rows[16].where == "org/data:17"


def test_a_split_of_the_hub_a_slice_of_one_named_files_and_the_first_rows_are_read(hub):
    assert len(list(read_rows(Source("org/data", split="train[:10%]")))) == 30
    assert len(list(read_rows(Source("org/data", split="train", data_files="test-0.parquet")))) == 2
    assert len(list(read_rows(Source("org/data", split="train", rows=270)))) == 270
    with pytest.raises(UserError, match=r"^data set org/data cannot be read from the Hugging Face hub: Unknown split"):
        list(read_rows(Source("org/data", split="validation")))
    before = hash_source(Source("org/data", split="train"))
    assert before == hash_source(Source("org/data", split="train")) != hash_source(Source("org/data", split="test"))
    pq.write_table(pa.Table.from_pylist(hub[:100]), "org/data/train-0.parquet")
    assert before != hash_source(Source("org/data", split="train"))
