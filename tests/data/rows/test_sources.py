from pathlib import Path

import pytest

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.rows.sources import RowSettings, Source, find_sources, has_split
from qlora_lightning.support.errors import UserError


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def touch(*names):
    """Make files and their folders."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def find(value):
    return [[str(file) for file in source.files] for source in find_sources(value, "train")]


def test_a_file_a_folder_and_a_glob(monkeypatch):
    touch("d/b.jsonl", "d/a.json", "d/deep/c.csv.gz", "d/README.md", "d/.hidden.jsonl", "d/.git/x.json", "e.PARQUET")
    touch("d/b.jsonl.py", "a[1].jsonl", "a1.jsonl")
    assert find("e.PARQUET") == [["e.PARQUET"]]
    assert find(Path("d")) == find("d/") == find("d/**") == [["d/a.json", "d/b.jsonl", "d/deep/c.csv.gz"]]
    assert find("d/[ab].*") == find("d/*") == [["d/a.json", "d/b.jsonl"]]
    assert find(["d/b.jsonl", {"path": "d/a.json"}]) == [["d/b.jsonl"], ["d/a.json"]]
    assert find("a[1].jsonl") == [["a[1].jsonl"]]  # which looks like a glob
    monkeypatch.setenv("HOME", str(Path("d").absolute()))
    assert find("~/a.json") == find("~/*.json") == [[str(Path("d/a.json").absolute())]]


def test_names_that_are_no_paths_are_data_sets_of_the_hub():
    assert find_sources("org/data-v1.5", "train") == [Source("org/data-v1.5", split="train")]
    assert find_sources("org/data", "val")[0].split == "validation"
    assert find_sources("org/data", "predict") == [Source("org/data", split="test")]
    entry = {"path": "org/data", "weight": 2, "split": "train[:10%]", "name": "main", "revision": "v1"}
    entry["data_files"] = ["a.json"]
    assert find_sources(entry, "train") == [Source("org/data", (), 2, "train[:10%]", "main", "v1", ["a.json"])]
    touch("org/train.jsonl")
    assert find_sources({"path": "org/data", "split": "train"}, "train") == [Source("org/data", split="train")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("data/trian.jsonl", "data.train: data file data/trian.jsonl does not exist"),
        ("data/trian.jsonl", "Did you mean 'data/train.jsonl'?"),
        ("data/othr", "Did you mean 'data/other'?"),
        *((value, "does not exist") for value in ("../org/data", "org/train.jsonl", "/no/data", "~/data", "squad", 3)),
        ("data/other", "no train files in data/other: expected .jsonl, .json, .csv, .tsv, .parquet, .arrow, each also"),
        ("data/*.csv", "no train files in data/*.csv"),
        ([], "data.train: expected at least one source"),
        ("", "data.train: expected a file, folder, glob or hub id, or a mapping with `path`, found {'path': ''}."),
        ({"path": "a.jsonl", "wieght": 1}, "found 'wieght'. Did you mean 'weight'?"),
        *(({"path": "a.jsonl", "weight": value}, "must be a number above 0") for value in (0, "3", float("nan"))),
        *(({"path": "a.jsonl", "rows": value}, "must be a whole number above 0") for value in (0, 2.5)),
        ({"path": "a.jsonl", "split": "train"}, "split is for data sets of the hub, but a.jsonl is a path."),
        ([{"path": "a.jsonl", "weight": 1}, "a.jsonl"], "a weight for all of them or for none."),
    ],
)
def test_what_names_no_source_is_refused(value, expected):
    touch("a.jsonl", "data/train.jsonl", "data/other/a.txt")
    with pytest.raises(UserError) as error:
        find_sources(value, "train")
    assert expected in str(error.value)


def test_a_source_differs_from_the_rest_in_what_it_names():
    touch("a.jsonl", "b.jsonl")
    rest = RowSettings("alpaca", {"q": "prompt"}, "Be kind.", {"bot": "assistant"})
    own = {"format": "messages", "columns": {}, "system": None, "roles": {"me": "user"}, "encoding": "utf-16"}
    first, second = find_sources(
        [{"path": "a.jsonl", "rows": 5, **own}, "b.jsonl"], "train", settings=rest, encoding="latin-1"
    )
    assert first.settings == RowSettings("messages", {}, None, {"me": "user"})
    assert (first.rows, first.encoding) == (5, "utf-16")
    assert (second.settings, second.encoding) == (rest, "latin-1")
    assert find_sources({"path": "a.jsonl", "system": "Be brief."}, "val", settings=rest)[0].settings.format == "alpaca"


def texts(data, split):
    return ["".join(map(chr, sample.ids.tolist())).rstrip() for sample in data.samples[split]]


@pytest.mark.parametrize("stages", [["fit", "test"], ["test", "fit"]])
def test_sources_of_one_run_may_differ_whichever_split_comes_first(characters, stages, monkeypatch):
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", "cache")
    Path("dolly.csv").write_text(";instruction;context;response\n0;Who?;;Ada\n1;When?;;1843\n2;Why?;;No\n")
    Path("chat.jsonl").write_text('{"conversations": [{"from": "me", "value": "q"}, {"from": "bing", "value": "a"}]}\n')
    Path("test.json").write_text('[{"query": "q", "answer": "a"}]')
    columns = {"context": "input", "response": "output"}
    dolly = {"path": "dolly.csv", "delimiter": ";", "rows": 2, "columns": columns, "system": "Be brief."}
    chat = {"path": "chat.jsonl", "roles": {"me": "user"}}
    data = InstructionDataModule(
        [dolly, chat], val=chat, test="test.json", columns={"query": "question"}, tokenizer=characters
    )
    for stage in stages:
        data.setup(stage)
    asked = ["{s\nBe brief.}\n{u\nWho?}\n{a\nAda}", "{s\nBe brief.}\n{u\nWhen?}\n{a\n1843}", "{u\nq}\n{a\na}"]
    assert texts(data, "train") == asked
    assert texts(data, "val") == texts(data, "test") == asked[2:]
    assert data.reports["train"].formats == ["alpaca", "sharegpt"]


def test_columns_that_no_row_of_a_source_has_are_refused(characters):
    Path("a.jsonl").write_text('{"question": "q", "answer": "a", "label": true}\n')
    data = InstructionDataModule("a.jsonl", columns={"lable": None}, tokenizer=characters)
    with pytest.raises(UserError, match="columns: no row has 'lable', found question, answer, label"):
        data.setup("fit")


def test_files_and_folders_named_after_a_split_are_of_that_split_alone():
    touch("d/train.jsonl", "d/train-00001.parquet", "d/more.jsonl", "d/val.jsonl", "d/dev/a.json", "d/test/b.csv")

    def names(split):
        return sorted(str(file) for source in find_sources("d", split) for file in source.files)

    assert names("train") == ["d/more.jsonl", "d/train-00001.parquet", "d/train.jsonl"]
    assert names("val") == ["d/dev/a.json", "d/val.jsonl"]
    assert names("test") == ["d/test/b.csv"]
    assert [has_split("d", split) for split in ("train", "val", "test")] == [True, True, True]
    touch("e/dev-tools.jsonl", "e/test_driven.jsonl", "e/training.jsonl", "f/train.jsonl")
    assert len(find_sources("e", "train")[0].files) == 3
    assert [str(file) for file in find_sources("f", "test")[0].files] == ["f/train.jsonl"]  # asked for by name
    assert [str(file) for file in find_sources("d/*.jsonl", "train")[0].files] == [
        "d/more.jsonl",
        "d/train.jsonl",
        "d/val.jsonl",
    ]
