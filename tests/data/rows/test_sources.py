from pathlib import Path

import pytest

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.rows.sources import RowSettings, Source, find_sources
from qlora_lightning.support.errors import UserError


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def touch(*names):
    """Make files that are not empty, and their folders."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}\n")


def find(value, split="train"):
    return [[str(file) for file in source.files] for source in find_sources(value, split)]


def refusal(value, split="train"):
    with pytest.raises(UserError) as error:
        find_sources(value, split)
    return str(error.value)


def test_a_file_a_folder_and_a_glob():
    touch("d/b.jsonl", "d/a.json", "d/deep/c.csv.gz", "d/README.md", "d/.hidden.jsonl", "d/.git/x.json", "e.PARQUET")
    touch("d/b.jsonl.py")
    assert find("e.PARQUET") == [["e.PARQUET"]]
    assert find(Path("d")) == find("d/") == [["d/a.json", "d/b.jsonl", "d/deep/c.csv.gz"]]
    assert find("d/*") == find("d/**") == [["d/a.json", "d/b.jsonl", "d/deep/c.csv.gz"]]
    assert find("d/[ab].*") == [["d/a.json", "d/b.jsonl"]]
    assert find("**/*.jsonl") == [["d/b.jsonl"]]
    assert find(["d/b.jsonl", {"path": "d/a.json"}]) == [["d/b.jsonl"], ["d/a.json"]]


def test_a_file_whose_name_looks_like_a_glob_is_that_file():
    touch("a[1].jsonl", "a1.jsonl")
    assert find("a[1].jsonl") == [["a[1].jsonl"]]


def test_the_home_folder_is_found(monkeypatch):
    touch("home/a.jsonl")
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    assert find("~/a.jsonl") == find("~/*.jsonl") == [[str(Path("home/a.jsonl").absolute())]]


def test_names_that_are_no_paths_are_data_sets_of_the_hub():
    assert find_sources("org/data-v1.5", "train") == [Source("org/data-v1.5", split="train")]
    assert find_sources("org/data", "val")[0].split == "validation"
    assert find_sources("org/data", "test")[0].split == "test"
    assert find_sources("org/data", "predict", streaming=True) == [Source("org/data", split="test", streaming=True)]
    entry = {"path": "org/data", "weight": 2, "split": "train[:10%]", "name": "main", "revision": "v1"}
    entry["data_files"] = ["a.json"]
    assert find_sources(entry, "train") == [Source("org/data", (), 2.0, "train[:10%]", "main", "v1", ["a.json"])]


def test_a_misspelt_path_does_not_become_a_data_set_of_the_hub():
    touch("data/train.jsonl", "data/other/a.jsonl")
    assert "data/trian.jsonl does not exist" in refusal("data/trian.jsonl")
    assert "Did you mean 'data/train.jsonl'?" in refusal("data/trian.jsonl")
    assert "Did you mean 'data/other'?" in refusal("data/othr")
    assert "data/xyz does not exist" in refusal("data/xyz")
    assert "For the data set of the hub write {path: data/xyz, split: train}." in refusal("data/xyz")
    assert find_sources({"path": "data/xyz", "split": "train"}, "train") == [Source("data/xyz", split="train")]
    for value in ("org/train.jsonl", "../org/data", "./data/xyz", "/no/data", "~/data", "a/b/c", "squad"):
        assert "does not exist" in refusal(value)


def test_a_folder_or_a_glob_without_data_an_unknown_kind_and_an_empty_file_are_refused():
    touch("d/README.md", "d/.hidden.jsonl", "a.txt", "b")
    Path("empty.jsonl").touch()
    Path("e").mkdir()
    Path("e/empty.csv").touch()
    assert (
        "no data files in d: expected .jsonl, .json, .csv, .tsv, .parquet or .arrow, each also compressed"
        in refusal("d")
    )
    assert "no data files in d/*.md: expected" in refusal("d/*.md")
    assert "no data files in d/*.jsonl" in refusal("d/*.jsonl")
    assert "a.txt ends in '.txt': expected .jsonl" in refusal("a.txt")
    assert "b ends in 'nothing': expected .jsonl" in refusal("b")
    assert "empty.jsonl is empty" in refusal("empty.jsonl")
    assert "e/empty.csv is empty" in refusal("e")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], "data.train: expected at least one file, folder, glob or hub id, found an empty list."),
        ("", "data.train: expected a file, folder, glob or hub id, or a mapping with `path`, found {'path': ''}."),
        (3, "or a mapping with `path`, found 3."),
        ({"weight": 1}, "or a mapping with `path`, found {'weight': 1}."),
        ({"path": "a.jsonl", "wieght": 1}, "found 'wieght'. Did you mean 'weight'?"),
        ({"path": "a.jsonl", "weight": 0}, "data.train: weight of a.jsonl must be a number above 0, found 0."),
        ({"path": "a.jsonl", "weight": True}, "found True."),
        ({"path": "a.jsonl", "weight": float("nan")}, "found nan."),
        (
            {"path": "a.jsonl", "split": "train"},
            "data.train: split is for data sets of the hub, but a.jsonl is a path.",
        ),
        ({"path": "a.jsonl", "columns": ["q"]}, "columns of a.jsonl must be a mapping {their name: our name}, found"),
        ({"path": "a.jsonl", "rows": 0}, "rows of a.jsonl must be a whole number above 0, found 0."),
        ({"path": "a.jsonl", "rows": 2.5}, "rows of a.jsonl must be a whole number above 0, found 2.5."),
        ([{"path": "a.jsonl", "weight": 1}, "b.jsonl"], "a.jsonl has a weight, b.jsonl has none: give all or none."),
    ],
)
def test_an_entry_that_is_none_is_refused(value, expected):
    touch("a.jsonl", "b.jsonl")
    assert expected in refusal(value)


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
    return ["".join(map(chr, sample.ids.tolist())) for sample in data.samples[split]]


@pytest.mark.parametrize("stages", [["fit", "test"], ["test", "fit"], ["validate", "fit", "test"]])
def test_sources_of_one_run_may_differ_whichever_split_comes_first(characters, stages, monkeypatch):
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", "cache")
    Path("dolly.csv").write_text(";instruction;context;response\n0;Who?;;Ada\n1;When?;;1843\n2;Why?;;No\n")
    Path("chat.jsonl").write_text('{"conversations": [{"from": "me", "value": "q"}, {"from": "bing", "value": "a"}]}\n')
    Path("test.json").write_text('[{"query": "q", "answer": "a"}]')
    columns = {"context": "input", "response": "output"}
    dolly = {"path": "dolly.csv", "rows": 2, "columns": columns, "system": "Be brief."}
    chat = {"path": "chat.jsonl", "roles": {"me": "user"}}
    data = InstructionDataModule(
        [dolly, chat], val=chat, test="test.json", columns={"query": "question"}, tokenizer=characters
    )
    for stage in stages:
        data.setup(stage)
    asked = ["{s\nBe brief.}\n{u\nWho?}\n{a\nAda}", "{s\nBe brief.}\n{u\nWhen?}\n{a\n1843}", "{u\nq}\n{a\na}"]
    assert [text.rstrip() for text in texts(data, "train")] == asked
    assert (
        [text.rstrip() for text in texts(data, "val")] == [text.rstrip() for text in texts(data, "test")] == asked[2:]
    )
    assert data.reports["train"].formats == ["alpaca", "sharegpt"]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_no_row_of_a_source_has_are_refused(characters, streaming):
    touch("a.jsonl")
    Path("a.jsonl").write_text('{"question": "q", "answer": "a", "label": true}\n')
    data = InstructionDataModule("a.jsonl", columns={"lable": None}, tokenizer=characters, streaming=streaming)
    with pytest.raises(UserError, match="columns: no row has 'lable', found question, answer, label"):
        data.setup("fit")
