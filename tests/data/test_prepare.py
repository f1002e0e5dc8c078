"""From rows to samples or prompts, and a report of what became of them; bad rows are named all at once."""

import copy
import json
from pathlib import Path

import pytest

from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.prepare import TOO_LONG, Recipe, prepare
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.support.errors import UserError


@pytest.fixture
def recipe(characters):
    return lambda **kwargs: Recipe(ChatRenderer(characters), **kwargs)


def pair(prompt="q", completion="k"):
    return {"prompt": prompt, "completion": completion}


def source(*values, file="a.jsonl", **settings):
    rows = [value if isinstance(value, BadRow) else Row(value, file, line) for line, value in enumerate(values, 1)]
    return RowSettings(**settings), rows


def prepared(*sources, recipe, **settings):
    return prepare(sources, recipe, "train", **settings)[:2]


def read(samples, n):
    return "".join(map(chr, samples[n].ids.tolist()))


def test_rows_become_samples_and_a_report(recipe):
    samples, report = prepared(source(pair("q", "ok"), pair("q" * 20, "k")), recipe=recipe(max_length=16))
    assert read(samples, 0) == "{u\nq}\n{a\nok}\n"
    assert samples[0].labels.tolist() == [-100] * 9 + [111, 107, 125, -100]
    assert read(samples, 1) == "{u\nqqqqqq}\n{a\nk}"  # of 31 tokens
    assert [samples.where(n) for n in range(2)] == ["a.jsonl:1", "a.jsonl:2"]
    counts = {"tokens": 29, "labelled": 5, "shortened": 1}
    assert report == Report("train", rows=2, samples=2, formats=["prompt_completion"], **counts)
    _, report = prepared(source(pair("q", "k" * 20)), recipe=recipe(max_length=16))
    assert (report.shortened, report.lost_labels) == (1, 14)  # 7 of 21 are left, without }


BAD = [  # a line of a file, and how the reason begins for which it is refused
    (b"no json", "not JSON: Expecting value: line 1 column 1"),
    (b'["messages"]', "list, expected a JSON object"),
    (b'{"text": "Four."}', "no format is recognised by its columns text"),
    (b'{"prompt": "q", "completion": null}', "'completion' is missing or null"),
    (b'{"prompt": "q", "completion": " "}', "the answer (message 2) is empty"),
    (b'{"prompt": "q{", "completion": "k"}', "message 1 (user) contains the control token '{' as text"),
    (b'{"prompt": "q\\ud83d", "completion": "k"}', "message 1 (user) contains half a character"),
    (b'{"prompt": "F\xfcnf", "completion": "k"}', "not UTF-8 text"),
]


@pytest.fixture
def bad_lines(tmp_path, monkeypatch):
    """Write train.jsonl: a bad row after every ten good ones; gives the lines of the bad ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    good = [json.dumps(pair(f"q{number}")).encode() for number in range(10)]
    Path("train.jsonl").write_bytes(b"\n".join(line for bad, _ in BAD for line in [*good, bad]))
    return [11 * number for number in range(1, 1 + len(BAD))]


def test_each_bad_row_is_named_with_its_line_and_reason_in_one_error_or_left_out(characters, bad_lines):
    with pytest.raises(UserError) as error:
        InstructionDataModule("train.jsonl", tokenizer=characters).setup("fit")
    first, *named, last = str(error.value).splitlines()
    assert first == f"{len(BAD)} rows cannot be used:"
    assert last == "Correct them, or leave them out with `on_bad_row: skip`."
    for line, found, (_, reason) in zip(bad_lines, named, BAD, strict=True):
        assert found.startswith(f"  train.jsonl:{line}: {reason}")
    data = InstructionDataModule("train.jsonl", tokenizer=characters, on_bad_row="skip")
    data.setup("fit")
    report = data.reports["train"]
    assert (report.rows, report.bad_rows, report.samples) == (11 * len(BAD), len(BAD), 10 * len(BAD))
    assert [read(data.samples["train"], n) for n in range(11)] == [f"{{u\nq{n % 10}}}\n{{a\nk}}\n" for n in range(11)]
    assert list(report.bad.values()) == [[f"train.jsonl:{line}"] for line in bad_lines]


def test_rows_left_out_are_counted_by_reason(recipe, talk):
    asked, answer = talk("q", "k")
    rows = source({"messages": [asked, {**answer, "train": False}]}, pair("q" * 20), pair(), pair("r"), pair())
    samples, report = prepared(rows, recipe=recipe(max_length=16, too_long="drop"), deduplicate=True)
    assert samples.row_ids.tolist() == [2, 3]
    assert (report.rows, report.samples, report.tokens, report.duplicates, report.bad_rows) == (5, 2, 24, 0, 0)
    assert report.unusable == 1  # what is dropped as too long, or twice, was asked for
    marked, twice = "every answer is marked `train: false`", "equal to an earlier row (deduplicate: true)"
    assert report.dropped == {marked: 1, TOO_LONG: 1, twice: 1}


@pytest.mark.parametrize(("too_long", "cut"), [("truncate", [8]), ("drop", []), ("split", [8, 8, 7])])
def test_a_document_is_cut_into_pieces_and_tokens_as_their_settings_say(recipe, too_long, cut):
    tokens = {"input_ids": [120] * 19, "labels": [120] * 19}
    for name, row, lengths in (("text", {"text": "x" * 19}, [8, 8, 6]), ("tokens", tokens, cut)):
        rows = source(row, format=name)
        samples, report = prepared(rows, recipe=recipe(max_length=8, too_long=too_long))
        assert samples.lengths.tolist() == lengths
        assert report.shortened == (lengths == [8])
        assert report.dropped == ({} if lengths else {TOO_LONG: 1})


def test_rows_of_all_kinds_stay_in_their_order(families, history_template, talk):
    chatml = copy.deepcopy(families["qwen25"])
    chatml.chat_template = history_template
    turns = {"messages": talk("q", "<think>hm</think>a", "r", "b")}  # rendered turn by turn: two texts
    rows = source(pair(), {"input_ids": [5, 6], "labels": [5, 6]}, turns, pair("<|im_end|>"), turns, pair("q", "z"))
    samples, report = prepared(rows, recipe=Recipe(ChatRenderer(chatml)))
    said = [chatml.decode([label for label in sample.labels.tolist() if label != -100]) for sample in samples]
    thoughts = ["<think>hm</think>a<|im_end|>", "b<|im_end|>"]
    assert said == ["k<|im_end|>", chatml.decode([6]), *thoughts, *thoughts, "z<|im_end|>"]
    assert samples.row_ids.tolist() == [0, 1, 2, 2, 4, 4, 5]
    assert report.bad_rows == 1
    rows = source({"messages": talk("q", "<think>hm</think>a", "r", "b " * 90)}, pair())
    samples, report = prepared(rows, recipe=Recipe(ChatRenderer(chatml), 60, "drop"))
    assert (samples.row_ids.tolist(), report.dropped) == ([1], {TOO_LONG: 1})  # as a whole


# ---- the report ------------------------------------------------------------------------------------------------------


def test_bad_rows_nothing_left_and_too_much_that_teaches_nothing_are_rejected():
    report = Report("train", rows=30, samples=5)
    for line in range(25):
        report.count_bad_row(BadRow(f"a:{line}", "empty" if line else "not JSON"))
    report.check(skip_bad=True)
    listed = r"25 rows cannot be used:\n  a:0: not JSON\n  a:1, a:2, .*, a:19: empty\n  and 5 more\n"
    with pytest.raises(UserError, match=listed + r".*on_bad_row: skip"):
        report.check(skip_bad=False)
    with pytest.raises(UserError, match=r"val: none of 1,200 rows is left \(1,200: too long\)"):
        Report("val", rows=1_200, dropped={"too long": 1_200}).check(skip_bad=True)
    Report("train", rows=20, samples=19, unusable=1).check(skip_bad=True)
    with pytest.raises(UserError, match=r"^1 of 19 rows of train leave nothing to train on \(more than 5%"):
        Report("train", rows=19, samples=18, unusable=1).check(skip_bad=True)
