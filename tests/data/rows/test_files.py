"""From what ``data.train`` names to rows: files of every kind, folders, URLs, data sets of the hub."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_lightning import InstructionDataModule
from tests.errors import rejects

ROWS = [{"x": str(number), "text": "é\n,{" * number} for number in range(7)]
KINDS = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"]
COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def touch(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def find_sources(value, split="train", **settings):
    return InstructionDataModule(**{split: value}, **settings).sources(split)


def read(value, split="train", **entry):
    return list(InstructionDataModule(**{split: {"path": value, **entry}}).load_rows(split))


def values(value, split="train", **entry):
    return [row.values for row in read(value, split, **entry)]


def content(kind):
    """The seven rows as a file of that kind."""
    lines = [json.dumps(row) for row in ROWS]
    if kind == ".jsonl":
        return "\n".join([*lines[:3], "", *lines[3:]]).encode()
    if kind == ".json":
        return "\ufeff\n[{}\n]\n".format(",\n\n ".join(lines)).encode()
    if kind in (".csv", ".tsv"):
        mark = "," if kind == ".csv" else "\t"
        records = [f'{row["x"]}{mark}"{row["text"]}"' for row in ROWS]
        return "\r\n".join([f"\ufeffx{mark}text", *records]).encode()
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(ROWS)
    if kind == ".parquet":
        pq.write_table(table, sink, row_group_size=3)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("kind", "suffix"), [*((kind, "") for kind in KINDS), *((".jsonl", each) for each in COMPRESSED)]
)
def test_every_kind_is_read_from_a_file_and_from_a_url(kind, suffix):
    data = COMPRESSED.get(suffix, bytes)(content(kind))
    Path(f"a{kind}{suffix}").write_bytes(data)
    with fsspec.open(f"memory://files/a{kind}{suffix}", "wb") as file:
        file.write(data)
    for place in (f"a{kind}{suffix}", f"memory://files/a{kind}{suffix}", f"memory://files/*{kind}{suffix}"):
        assert values(place) == ROWS


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_url_may_have_a_query(kind):
    Path(f"a{kind}").write_bytes(content(kind))
    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            assert values(f"http://127.0.0.1:{server.server_port}/a{kind}?download=true") == ROWS
        finally:
            server.shutdown()


def test_a_folder_is_read_in_the_order_of_its_files_or_the_first_rows_of_it():
    Path("d").mkdir()
    for name, kind in (("b.json", ".jsonl"), ("a.csv", ".csv"), ("a.parquet", ".parquet")):  # lines in a .json
        Path("d", name).write_bytes(content(kind))
    rows = read("d")
    assert [row.where for row in rows if row.values["x"] == "0"] == ["d/a.csv:2", "d/a.parquet:1", "d/b.json:1"]
    assert values("d", rows=17) == [row.values for row in rows[:17]]


def test_what_save_to_disk_wrote_is_read_without_what_datasets_keeps_beside_it():
    saved = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2]))
    saved.save_to_disk("both", num_shards={"train": 2, "test": 1})
    Path("both/train/cache-1.arrow").write_bytes(content(".arrow"))
    assert values("both") == values("both/train") == ROWS
    assert values("both", "test") == ROWS[:2]
    with rejects("data.val", "validation", "both"):
        find_sources("both", "val")


MARKED = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
ADVICE = "name its encoding, as in `encoding: cp1252` (what Excel writes in Western Europe)"
OF_2 = ", but the header has 2 (read by ',', which `delimiter:` changes)"
FILES = [  # name, content, rows as (line, values), or what is wrong with the file
    ("a.jsonl", b'\xef\xbb\xbf{"x": 1}\r\n\r\n  \n{"x": "\xe2\x80\xa8"}\n', [(1, {"x": 1}), (4, {"x": "\u2028"})]),
    ("a.jsonl", '{"x": 1}\n\ufeff{"x": 2}\n', [(1, {"x": 1}), (2, {"x": 2})]),  # files that were concatenated
    ("a.json", '[{"x": 1}, 12]', [(1, {"x": 1}), ("a.json:2", "int, expected a JSON object")]),
    ("a.json", '[{"x": 1},\n{"x": }]', "a.json cannot be read (ValueError: row 2 is not JSON"),
    # the line where a row begins, as an editor counts
    ("a.csv", 'x,"a y"\r\n1,"a ""b"",\nc"\n\n"",5', [(2, {"x": "1", "a y": 'a "b",\nc'}), (5, {"x": "", "a y": "5"})]),
    ("a.csv", "\nx,y\nNA,007\n", [(3, {"x": "NA", "y": "007"})]),
    ("a.csv", "x,\nNA,0\n1,2,3\n4\n", [
        *((2, {"x": "NA"}), ("a.csv:3", f"has 3 values{OF_2}"), ("a.csv:4", f"has 1 value{OF_2}")),
    ]),
    ("a.csv", 'x,y\n"1"2,3\n4,5\n', [("a.csv:2", "not CSV: ',' expected after '\"'"), (3, {"x": "4", "y": "5"})]),
    ("a.csv", 'x,y\n1,"2\n3,4\n5",6\n7,8\n', [
        *(("a.csv:2", f"has 3 values in 3 lines{OF_2}"), (5, {"x": "7", "y": "8"})),
    ]),
    (  # two stray quotes, far apart
        *("a.csv", 'x,y\n"1,2\n' + "3,4\n" * 100 + '5"\n'),
        "a.csv cannot be read (ValueError: the row that begins in line 2 has 1 value in 102 lines",
    ),
    # of which lines are rows nobody knows after a quote that does not end in its line as it should
    *(
        ("a.csv", f"x,y\n{lines}", f"a.csv cannot be read (ValueError: the row that begins in line {line} has a quote")
        for line, lines in (
            (3, '1,2\n"3,4\n5,6\n'),  # to the end of the file
            (3, '1,2\n3,"4'),
            (2, '1,"2\n' + "3,4\n" * 500 + '5,"6"\n7,8\n'),  # to another row's quote
            (2, '1,"he said "hi"\nand, bye"\n7,8\n'),  # whose second line would be a row
        )
    ),
    ("a.csv", 'x,"y\n1,2\n', "a.csv cannot be read (ValueError: the row that begins in line 1 has a quote"),
    # the delimiter is the one by which the header names several columns
    *(
        (name, f'{header.replace(";", mark)}\n1,5{mark}a\n', [(2, {"x": "1,5", "y, z": "a"})])
        for mark in ";\t|"
        for name, header in (("a.csv", '"x";"y, z"'), ("a.tsv", 'x;"y, z"'))
    ),
    ("a.csv", "x;y\n1,5;a\n", [(2, {"x": "1,5", "y": "a"})]),
    ("a.tsv", "x,y\n1,2\n", [(2, {"x": "1", "y": "2"})]),
    ("a.csv", '"x;y","y|z\tz"\n1,2\n', [(2, {"x;y": "1", "y|z\tz": "2"})]),
    ("a.csv", "text\na;b\n", [(2, {"text": "a;b"})]),
    ("a.csv", '"text; all of it"\na;b\n', [(2, {"text; all of it": "a;b"})]),
    ("a.csv", "text;\na;b\n", [(2, {"text;": "a;b"})]),
    ("a.csv", "x;y|z\na;b|c\n", [(2, {"x;y|z": "a;b|c"})]),  # of which nobody knows
    ("a.csv", "x;y|z\na;b\n", [(2, {"x": "a", "y|z": "b"})]),
    ("a.csv", '\n"x\n1";"y, z"\n\n"1\n,5";a\n', [(5, {"x\n1": "1\n,5", "y, z": "a"})]),
    # one column, by whose first row it has no other
    *(("a.csv", f"text{mark}1\nso it is\n", [(2, {f"text{mark}1": "so it is"})]) for mark in ";\t|"),
    ("a.csv", "x,x,,\n1,2,,\n", "a.csv cannot be read (ValueError: two columns have the same name, of x, x)"),
    ("a.csv", b"x,y\n1,\xff\n", [("a.csv:2", f"not UTF-8 text: save it as UTF-8, or {ADVICE}")]),
    ("a.csv", b"x,\xff\n1,2\n", f"a.csv cannot be read (ValueError: not UTF-8 text: save it as UTF-8, or {ADVICE}"),
    ("a.json", b'[{"x": "\xff"}, {"x": 1, "x": 2}, {}]', [
        ("a.json:1", f"not UTF-8 text: save it as UTF-8, or {ADVICE}"),
        ("a.json:2", "not JSON: the key 'x' is there twice"),
        (3, {}),
    ]),
    ("a.json", '[{"x": 1}] [{"x": 2}]', "a.json cannot be read (ValueError: not JSON: text follows the array)"),
    ("a.json", '[{"x": 1},', "a.json cannot be read (ValueError: row 2 is not JSON"),
    *(
        ("a.json", text, f"cannot be read (ValueError: not JSON: commas before {place}: found {found}, expected {n}")
        for text, found, place, n in (
            ('[{"x": 1} {"x": 2}]', 0, "row 2", 1),
            ('[{"x": 1},\n,{"x": 2}]', 2, "row 2", 1),
            ('[{"x": 1},]', 1, "the end", 0),
            ('[,{"x": 1}]', 1, "row 1", 0),
            (f'[{{"x": 1}}{" " * (1 << 23)}{{"x": 2}}]', 0, "row 2", 1),
        )
    ),
    ("a.json", f'[{{"x": 1}}{" " * (1 << 23)}, {{"x": 2}}]', [(1, {"x": 1}), (2, {"x": 2})]),
    ("a.json", " [ ] ", "a.json is empty: it holds no rows."),
    *(("a.csv", "x,y\r\né,1".encode(encoding), [(2, {"x": "é", "y": "1"})]) for encoding in ("utf-16", "utf-8-sig")),
    *(("a.jsonl", mark + '{"x": "€"}\n'.encode(name), [(1, {"x": "€"})]) for mark, name in MARKED.items()),
    ("a.json", "[{}]".encode("utf-16"), [(1, {})]),
    ("a.jsonl", '{"x": 1, "x": 2}', [("a.jsonl:1", "not JSON: the key 'x' is there twice")]),
    ("a.jsonl", "\n\n", "a.jsonl is empty: it holds no rows."),
    ("a.parquet", b"PAR1" * 9, "a.parquet cannot be read"),
    ("a.jsonl.zst", b'{"x": 1}\n', "a.jsonl.zst cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), FILES)
def test_files(name, content, expected):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if not isinstance(expected, str):
        assert [(row.line, row.values) if hasattr(row, "line") else row[:2] for row in read(name)] == expected
        return
    with rejects("file.empty" if "empty" in expected else "file.unreadable", expected):
        read(name)


TOO_LARGE = "more than 64 MB of text or 4 million values"
NESTED = pa.ListArray.from_arrays(pa.array([0, 5_000_000], pa.int32()), pa.nulls(5_000_000))
LARGE = [  # name, a beginning, what follows it 80 times, and what is said of the row
    ("a.csv", b'text\n"', b"a,\n" + b"a" * 1_000_000, "the row that begins in line 2 has a quote"),
    pytest.param(
        *("a.csv", b"text\n", b"a" * 1_000_000, "a.csv:2: not CSV: field larger than field limit (64000000)"),
        marks=pytest.mark.slow,
    ),
    ("a.jsonl", b'{"text": "', b"a" * 1_000_000, f"a.jsonl:1: {TOO_LARGE}"),
    ("a.json", b'[{"text": "a"}, {"x": "', b"a" * 1_000_000, f"row 2 has {TOO_LARGE}"),
    ("a.json", b"[", b"[" * 1_000, "a.json cannot be read (RecursionError: maximum recursion depth"),
    ("a.json", b"[", b"1," * 1_000, "10,240 rows cannot be used"),
    ("a.parquet", pa.table({"text": ["a"], "x": NESTED}), None, f"a.parquet:1: {TOO_LARGE}"),
]


@pytest.mark.parametrize(("name", "start", "part", "expected"), LARGE)
def test_a_row_of_any_size_is_rejected(characters, name, start, part, expected):
    if part:
        Path(name).write_bytes(start + part * 80)
    else:
        pq.write_table(start, name)
    is_whole_file = name != "a.jsonl" and "rows" not in expected and f"{name}:" not in expected
    with rejects("file.unreadable" if is_whole_file else "rows.bad", expected):
        InstructionDataModule(name, tokenizer=characters, format="text").setup("fit")


def test_an_encoding_and_a_delimiter_can_be_named():
    rows = [{"x": "é" * number, "y": "Ä;\n"} for number in range(1, 5)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    records = "\n".join(["x;y", *(f'{row["x"]};"{row["y"]}"' for row in rows)])
    Path("a.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    Path("a.csv").write_bytes(records.encode("utf-16"))
    assert values("a.jsonl", encoding="latin-1") == values("a.csv", encoding="utf-16", delimiter=";") == rows


def of_images(rows):
    """A table of rows whose ``photo`` is declared an image, which ``datasets`` would fetch."""
    table = pa.Table.from_pylist(rows)
    features = {**datasets.Features.from_arrow_schema(table.schema), "photo": datasets.Image()}
    return table.replace_schema_metadata(datasets.Features(features).arrow_schema.metadata)


PHOTO = {"photo": {"bytes": b"", "path": "http://127.0.0.1:9/a.png"}}


def test_keys_that_arrow_fills_in_are_left_out_json_is_parsed_and_no_image_is_fetched():
    """Every struct of a column has the keys of all; a null inside would teach the model to write it."""
    rows = [{"call": {"city": "Rome"}, "n": None}, {"call": {"day": "Monday", "list": [{"a": 1}, {"b": 2}]}, "n": 1}]
    rows = [row | PHOTO for row in rows]
    table = of_images(rows)
    if hasattr(pa, "json_"):  # from pyarrow 19 on
        texts = pa.array(['{"x": [1]}', "2"])
        rows = [rows[0] | {"json": {"x": [1]}}, rows[1] | {"json": 2}]
        pq.write_table(table.append_column("json", pa.ExtensionArray.from_storage(pa.json_(), texts)), "a.parquet")
        assert values("a.parquet") == rows
        texts = pa.array(["{}", '{"x": [{"y": 1, "y": 2}]}'])
        pq.write_table(pa.table({"json": pa.ExtensionArray.from_storage(pa.json_(), texts)}), "b.parquet")
        assert read("b.parquet")[1][:2] == ("b.parquet:2", "'json': not JSON (the key 'y' is there twice)")
    else:
        pq.write_table(table, "a.parquet")
        assert values("a.parquet") == rows


def test_two_columns_of_one_name_are_rejected_in_parquet_as_in_csv():
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["x", "x"]), "a.parquet")
    with rejects("file.unreadable", "a.parquet cannot be read (ValueError: two columns have the same name, of x, x)"):
        read("a.parquet")


def test_rows_of_a_small_file_that_unpacks_to_many_bytes_are_read_one_by_one():
    pq.write_table(pa.table({"x": ["a" * 1_000_000] * 200}), "a.parquet")
    assert Path("a.parquet").stat().st_size < 1_000_000
    rows = iter(InstructionDataModule("a.parquet").load_rows("train"))
    next(rows)
    assert pa.total_allocated_bytes() < 50_000_000


def test_a_split_of_the_hub_a_slice_of_one_named_files_and_the_first_rows_are_read(tmp_path, monkeypatch):
    """`datasets` reads a folder of that name as it reads a data set of the hub, without a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = [{"x": f"row {number}", "messages": [{"role": "user", "content": "é"}]} for number in range(300)]
    rows = [row | PHOTO for row in rows]
    entries = [{"split": "train"}, {"split": "train[:10%]"}]
    entries += [{"split": "train", "data_files": "test-0.parquet", "rows": 1}, {"split": "validation"}]
    # named before the folder is there, which would be read as a folder
    data = [InstructionDataModule({"path": "org/data", **entry}).load_rows("train") for entry in entries]
    Path("org/data").mkdir(parents=True)
    pq.write_table(of_images(rows), "org/data/train-0.parquet")
    pq.write_table(of_images(rows[:2]), "org/data/test-0.parquet")

    whole, tenth, first = map(list, data[:3])
    assert [row.values for row in whole] == rows
    assert whole[16].where == "org/data:17"
    assert [row.values for row in tenth] == rows[:30]
    assert [row.values for row in first] == rows[:1]
    with rejects("file.unreadable", "data set org/data", "Unknown split"):
        list(data[3])


# ---- what names a source ---------------------------------------------------------------------------------------------


def test_a_file_a_folder_and_a_glob():
    def find(value):
        return [[str(file) for file in source.files] for source in find_sources(value, "train")]

    touch("d/b.jsonl", "d/a.json", "d/deep/c.csv.gz", "d/README.md", "d/.hidden.jsonl", "d/.git/x.json", "e.PARQUET")
    touch("d/b.jsonl.py", "a[1].jsonl", "a1.jsonl")
    assert find("e.PARQUET") == [["e.PARQUET"]]
    assert find(Path("d")) == find("d/") == find("d/**") == [["d/a.json", "d/b.jsonl", "d/deep/c.csv.gz"]]
    assert find("d/[ab].*") == find("d/*") == [["d/a.json", "d/b.jsonl"]]
    assert find(["d/b.jsonl", {"path": "d/a.json"}]) == [["d/b.jsonl"], ["d/a.json"]]
    assert find("a[1].jsonl") == [["a[1].jsonl"]]  # which looks like a glob
    assert find("https://org.de/a.jsonl?download=true") == [["https://org.de/a.jsonl?download=true"]]


def test_names_that_are_no_paths_are_data_sets_of_the_hub():
    def named(value, split="train"):
        (found,) = find_sources(value, split)
        assert not found.files
        return found.path, found.weight, found.split, found.name, found.revision, found.data_files

    assert named("org/data-v1.5", "val") == ("org/data-v1.5", None, "validation", None, None, None)
    entry = {"path": "org/data", "weight": 2, "split": "train[:10%]", "name": "main", "revision": "v1"}
    entry["data_files"] = ["a.json"]
    assert named(entry) == ("org/data", 2, "train[:10%]", "main", "v1", ["a.json"])
    touch("org/train.jsonl")
    assert named({"path": "org/data", "split": "train"}) == ("org/data", None, "train", None, None, None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("data/trian.jsonl", "Did you mean 'data/train.jsonl'?"),
        ("org/train.jsonl", "data.train: data file org/train.jsonl does not exist"),
        ("data/other", "no train files in the folder data/other: expected .jsonl, .json, .csv, .tsv, .parquet, .arrow"),
        ({"path": ""}, "data.train: expected a file, folder, glob, URL or hub id, or a mapping with `path`, found {"),
        ({"path": "a.jsonl", "wieght": 1}, "found 'wieght'. Did you mean 'weight'?"),
        *(
            ({"path": "a.jsonl", key: value}, f"{key} of a.jsonl is {value!r}: expected ")
            for key, value in (
                *(("columns", each) for each in (["x"], "x", {"x": 1}, {False: "x"})),
                *(("roles", each) for each in ("bot", {"me": "asistant"}, {"me": None}, {1: "user"})),
                *(("system", each) for each in (5, ["s"])),
                *(("format", each) for each in (5, True)),
                *(("encoding", each) for each in (1252, True)),
                *(("delimiter", each) for each in ("::", "", '"', 5)),
                *((key, 20240101) for key in ("split", "name", "revision", "data_files")),
            )
        ),
        *((value, "found") for value in (5, True, {"path": ["a.jsonl"]})),
        ("", "data.train: expected a file"),
        *((value, "expected") for value in ({}, [], [""])),
        ("gone.jsonl", "gone.jsonl is a link to nowhere.jsonl, which does not exist"),
        ("links", "links/b.jsonl is a link to ../nowhere.jsonl, which does not exist"),
        ("links/*", "links/b.jsonl is a link to ../nowhere.jsonl, which does not exist"),
        ("dat*", "dat* matches folders alone: name one of them, or files in them, as in dat*/*.jsonl"),
        ("pipe.jsonl", "pipe.jsonl is a pipe or a device: expected a file"),
        ({"path": "a.jsonl", "split": "train"}, "split is for data sets of the hub, but a.jsonl is a path."),
    ],
)
def test_what_names_no_source_is_rejected(value, expected):
    touch("a.jsonl", "data/train.jsonl", "data/other/a.txt", "links/a.jsonl")
    Path("gone.jsonl").symlink_to("nowhere.jsonl")
    Path("links/b.jsonl").symlink_to("../nowhere.jsonl")
    os.mkfifo("pipe.jsonl")
    with rejects("data.train", expected):
        find_sources(value, "train")


def test_a_glob_takes_files_alone_as_a_folder_does():
    touch("d/a.jsonl", "d/b.jsonl/c.jsonl")
    os.mkfifo("d/pipe.jsonl")
    assert [str(file) for file in find_sources("d/*")[0].files] == ["d/a.jsonl"]
    assert [str(file) for file in find_sources("d")[0].files] == ["d/a.jsonl", "d/b.jsonl/c.jsonl"]


def test_a_source_differs_from_the_rest_in_what_it_names():
    touch("a.jsonl", "b.jsonl")
    rest = {"format": "alpaca", "columns": {"q": "prompt"}, "system": "Be kind.", "roles": {"bot": "assistant"}}
    rest["encoding"] = "latin-1"
    own = {"format": "messages", "columns": {}, "system": None, "roles": {"me": "user"}, "rows": 5}
    one, other = find_sources([{"path": "a.jsonl", **own}, "b.jsonl"], "train", **rest)
    assert {key: getattr(one, key) for key in own} == own
    assert {key: getattr(other, key) for key in rest} == rest


def test_files_and_folders_named_after_a_split_are_of_that_split_alone():
    touch("d/train.jsonl", "d/train-00001.parquet", "d/more.jsonl", "d/val.jsonl", "d/dev/a.json", "d/test/b.csv")

    def names(split):
        return sorted(str(file) for source in find_sources("d", split) for file in source.files)

    assert names("train") == ["d/more.jsonl", "d/train-00001.parquet", "d/train.jsonl"]
    assert names("val") == ["d/dev/a.json", "d/val.jsonl"]
    assert names("test") == ["d/test/b.csv"]
    assert all(InstructionDataModule("d").sources(split) for split in ("train", "test"))
    touch("e/gsm8k_train.jsonl", "e/gsm8k_test.jsonl", "e/v1.0-eval.jsonl", "e/test_sft-0.csv", "e/valid2.csv")
    touch("e/latest.csv")
    assert [each.name for each in find_sources("e", "train")[0].files] == ["gsm8k_train.jsonl", "latest.csv"]
    assert len(find_sources("e", "test")[0].files) == 3
    assert len(find_sources("d/*.jsonl", "train")[0].files) == 3
