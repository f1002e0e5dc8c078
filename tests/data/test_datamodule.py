import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_lightning import InstructionDataModule
from tests.data.conftest import prepare_rows
from tests.errors import rejects
from tests.packed import unpack

# Lightning 2.6.6 still asks torch 2.13 with isinstance whether a loader is a leaf.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _no_seed_left(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")


@pytest.fixture
def files(write):
    pairs = [{"prompt": f"q{number}", "completion": "k" * (1 + number % 3)} for number in range(26)]
    return {"train": write("train.jsonl", pairs), "val": write("val.jsonl", pairs[:5])}


@pytest.fixture
def make(files, characters):
    return lambda **kwargs: InstructionDataModule(**files | {"tokenizer": characters, "batch_size": 2} | kwargs)


def test_in_file_order_without_shuffling_and_always_the_same_rows_if_a_run_overfits(make):
    overfits = SimpleNamespace(overfit_batches=2, global_rank=0, world_size=1)
    for options, trainer in (({"shuffle": False}, None), ({}, overfits)):
        data = make(**options)
        data.trainer = trainer
        data.setup("fit")
        for epoch in range(2):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            assert [batch["row_ids"].tolist() for batch in loader] == [[row, row + 1] for row in range(0, 26, 2)]


SETTINGS = [
    ({"too_long": "cut"}, "data.too_long", "'cut'"),
    ({"on_bad_row": "Skip"}, "data.on_bad_row", "'Skip'"),
    *(({"drop_answers": value}, "data.drop_answers", repr(value)) for value in ("N/A", [0])),
    *(
        ({name: value}, f"data.{name}", f"data.{name} is {value!r}: expected")
        for name, values in (("columns", ([], ["x"], {1: "x"})), ("roles", ("bot", {"me": "bot"})))
        for value in values
    ),
    *(({name: 5}, f"data.{name}", f"data.{name} is 5: expected") for name in ("format", "system", "encoding")),
    ({"batch_size": None, "tokens_per_batch": -1}, "data.tokens_per_batch", "-1"),
    ({"train": [{"path": "val.jsonl", "weight": 1}, "val.jsonl"]}, "data.train", "a weight for all"),
    ({"train": [{"path": "train.jsonl", "weight": 1}], "shuffle": False}, "data.shuffle", "weights"),
    ({"val": {"path": "val.jsonl", "weight": 2}}, "data.val", "a weight"),
    ({"val": {"path": "val.jsonl"}, "val_fraction": 0.1}, "data.val_fraction", "data.val"),
    ({"tokens_per_batch": 64}, "data.tokens_per_batch", "data.batch_size"),
    ({"shuffle": False, "batch_size": None, "tokens_per_batch": 64}, "data.tokens_per_batch", "`shuffle: false`"),
]


@pytest.mark.parametrize(("settings", "key", "fact"), SETTINGS)
def test_settings_that_mean_nothing_or_contradict_each_other_are_refused(make, settings, key, fact):
    with rejects(key, fact):
        make(**settings).setup("fit")


def test_val_fraction_holds_rows_out_by_the_checkpoints_seed(make, monkeypatch):
    def held(data):
        return data.samples["val"].row_ids.tolist()

    data = make(val=None, val_fraction=0.25)
    data.setup("validate")
    assert len(held(data)) == 6  # of 26
    assert (data.reports["train"].rows, data.reports["val"].rows) == (20, 6)
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    other = make(val=None, val_fraction=0.25)
    other.setup("fit")
    assert held(other) != held(data)
    other.load_state_dict(data.state_dict())
    assert held(other) == held(data)


def test_the_seed_is_torchs_without_seed_everything_and_no_global_number_is_drawn(make, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED")
    data, before = make(), torch.get_rng_state()
    assert data.state_dict() == {}
    data.setup("fit")
    assert data.state_dict() == {"seed": torch.initial_seed()}
    assert (len(list(data.train_dataloader())), len(list(data.val_dataloader()))) == (13, 3)
    assert torch.equal(before, torch.get_rng_state())
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)
    assert [batch["row_ids"].tolist() for batch in data.val_dataloader()] == [[2, 3], [-1]]


PAIR = {"prompt": "q", "completion": "k"}


@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_rows_of_other_tasks_are_rejected_wherever_they_are_whatever_becomes_of_bad_rows(make, write, key):
    write("other.jsonl", [PAIR, {"prompt": "q"}, {**PAIR, key: False}])
    with rejects(f"row.{key}", "other.jsonl:3", f"{{{key}: null}}"):
        make(train="other.jsonl", on_bad_row="skip").setup("fit")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({**PAIR, "label": "sport", "images": [], "audio": {"bytes": None, "path": ""}, "rejected": None}, {}),
        ({"prompt": "q", "chosen": "k", "rejected": "b"}, {"chosen": "completion"}),
        ({**PAIR, "label": True, "images": ["a.png"]}, {"label": None, "images": None}),
    ],
)
def test_what_only_looks_like_another_task_and_what_the_user_names_trains(characters, row, columns):
    data = prepare_rows([row], characters, columns=columns)
    assert "".join(map(chr, data.samples["train"].ids)) == "{u\nq}\n{a\nk}\n"


def test_weights_give_each_source_its_share_of_an_epoch(make, write):
    write("few.jsonl", [{"prompt": f"z{number}", "completion": "k"} for number in range(4)])
    data = make(train=[{"path": "train.jsonl", "weight": 1}, {"path": "few.jsonl", "weight": 2}])
    data.setup("fit")
    sources = [source for batch in data.train_dataloader() for source in batch["source"].tolist()]
    assert (sources.count(0), sources.count(1)) == (10, 20)  # of 26 + 4 rows
    data = make(train=["train.jsonl", "few.jsonl"])  # without weights every row is trained once
    data.setup("fit")
    assert sorted(row for batch in data.train_dataloader() for row in batch["row_ids"].tolist()) == list(range(30))
    assert data.count_train_batches() == len(data.train_dataloader())


def test_rows_that_load_rows_changes_are_read_as_their_sources_say(write, characters):
    class Changed(InstructionDataModule):
        def load_rows(self, split):
            rows = [] if split == "val" else list(super().load_rows(split))[::-1]
            return [row._replace(values={**row.values, "completion": "k"}) for row in rows if row.values["x"] > 0]

    rows = [{"x": n, "ask": f"a{n}", "completion": "p"} for n in range(3)]
    first = {"path": write("a.jsonl", rows), "columns": {"ask": "prompt", "x": None}, "weight": 1}
    rows = [{"x": n, "prompt": f"b{n}", "completion": "p"} for n in range(7)]
    second = {"path": write("b.jsonl", rows), "system": "B", "weight": 3}
    settings = {"train": [first, second], "tokenizer": characters, "columns": {"x": None}, "batch_size": 2}
    InstructionDataModule(**settings).setup("fit")  # its samples are in the cache
    data = Changed(**settings)
    data.setup("fit")
    begins = [f"{{s\nB}}\n{{u\nb{n}}}" for n in (6, 5, 4, 3, 2, 1)] + [f"{{u\na{n}}}" for n in (2, 1)]
    expected = ["".join(f"{begin}\n{{a\nk}}\n") for begin in begins]
    assert ["".join(map(chr, sample.ids)) for sample in unpack(data.samples["train"])] == expected
    assert [source.path for source in data.sample_sources["train"]] == ["b.jsonl", "a.jsonl"]
    sources = [source for batch in data.train_dataloader() for source in batch["source"].tolist()]
    assert (sources.count(0), sources.count(1)) == (6, 2)
    data = Changed(**settings)
    rows = list(data.load_rows("train"))
    unweighted = dataclasses.replace(rows[0].source, weight=None)
    data.load_rows = lambda split: [] if split == "val" else [*rows, rows[0]._replace(source=unweighted)]
    with rejects("data.train", "a weight for all"):
        data.setup("fit")
    data = InstructionDataModule(**settings)
    data.load_rows = lambda split: [{"prompt": "q", "completion": "k"}]
    with rejects("load_rows.dict", "data.train"):
        data.setup("fit")


def test_a_folder_gives_all_splits_and_whoever_judges_is_told_of_rows_that_are_trained_on(write, characters):
    rows = [{"prompt": f"q{number}", "completion": "k"} for number in range(8)]
    Path("d").mkdir()
    for name, part in (("train", rows), ("val", rows[6:]), ("test", rows[5:6])):
        write(f"d/{name}.jsonl", part)
    data = InstructionDataModule("d", tokenizer=characters, batch_size=2)
    for stage, split, overlap in (("fit", "val", 2), ("test", "test", 1)):
        data.setup(stage)
        assert (len(data.samples["train"]), data.reports[split].overlap) == (8, overlap)
    judge = InstructionDataModule("gone.jsonl", test="d/test.jsonl", tokenizer=characters, batch_size=2)
    judge.setup("test")
    assert judge.reports["test"].overlap == 0


def test_a_delimiter_that_nobody_named_is_reported_also_from_the_cache(tmp_path, monkeypatch, characters, caplog):
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    for name, mark in (("a.csv", ";"), ("b.csv", ","), ("c.csv", ";"), ("d.tsv", "\t")):
        Path("d", name).write_text(f"prompt{mark}completion\nWie viel?{mark}1.5 EUR {name}\n")
    Path("e.csv").write_text("prompt|completion\nq|a\n")
    for _ in range(2):
        data = InstructionDataModule(["d", {"path": "e.csv", "delimiter": "|"}], tokenizer=characters)
        data.setup("fit")
        assert (data.reports["train"].rows, data.reports["train"].bad_rows) == (5, 0)
        assert data.reports["train"].delimiters == {";": ["d/a.csv", "d/c.csv"]}
    assert caplog.text.count("read by the delimiter ';': d/a.csv, d/c.csv") == 2


def test_rows_of_several_lines_of_a_csv_file_are_reported(tmp_path, monkeypatch, characters):
    """Two stray quotes swallow what is between them, as a text would be quoted that rightly has these lines."""
    monkeypatch.chdir(tmp_path)
    swallowed = 'q,"a\n' + "q,a\n" * 500 + 'q,a"\n'
    Path("a.csv").write_text(f'prompt,completion\nq1,"a\nb"\n{swallowed}q3,c\n')
    Path("b.jsonl").write_text(json.dumps({"prompt": "q4", "completion": "a\n" * 999}))
    data = InstructionDataModule(["a.csv", "b.jsonl"], tokenizer=characters, max_length=4096)
    data.setup("fit")
    assert "2 rows of CSV files span several lines, at most 502 (a.csv:4)" in data.reports["train"].describe()
    Path("a.csv").write_text("prompt,completion\nq,a\n")
    data = InstructionDataModule("a.csv", tokenizer=characters)
    data.setup("fit")
    assert "several lines" not in data.reports["train"].describe()


def test_a_column_that_no_row_has_is_reported(characters):
    report = prepare_rows([{"prompt": "q", "completion": "a"}], characters, columns={"body": "text"}).reports["train"]
    assert "data.columns names what no row of a source has: body" in report.describe()


def test_answers_that_mean_none_and_empty_questions_are_listed_and_dropped_if_asked(characters):
    answers = ["yes", "N/A", "null", "None of them", "nan"]
    rows = [{"prompt": f"q{number}", "completion": answer} for number, answer in enumerate(answers)]
    rows += [{"prompt": " ", "completion": "k"}, {"prompt": "Price?", "completion": "5 \x80"}]  # cp1252 as latin-1
    thought = {"role": "assistant", "content": "k", "reasoning_content": "\x81"}
    rows.append({"messages": [{"role": "user", "content": "q"}, thought]})
    report = prepare_rows(rows, characters).reports["train"]
    reasons = ["the answer is 'N/A'", "the answer is 'null'", "the answer is 'nan'", "the question is empty"]
    reasons += [f"the character U+{code}, of another encoding?" for code in ("0080", "0081")]
    places = [f"train:{line} ({reason})" for line, reason in zip((2, 3, 5, 6, 7, 8), reasons, strict=True)]
    assert (report.suspicious, report.suspicious_rows, report.samples) == (6, places, 8)
    assert "6 suspicious rows; data.drop_answers drops answers: train:2 (the answer is 'N/A')" in report.describe()
    report = prepare_rows(rows, characters, drop_answers=["n/a", None]).reports["train"]
    assert (report.dropped, report.suspicious) == ({"an answer is one of data.drop_answers": 2}, 4)
