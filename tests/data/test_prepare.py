"""From rows to samples, and a report of what became of them; bad rows are named all at once."""

import gzip
import json
from pathlib import Path

import pytest

from qlora_lightning import InstructionDataModule
from tests.data.conftest import prepare_rows
from tests.errors import rejects
from tests.packed import unpack


def pair(prompt="q", completion="k"):
    return {"prompt": prompt, "completion": completion}


def read(samples, n):
    return "".join(map(chr, unpack(samples)[n].ids))


def test_rows_become_samples_and_a_report(characters, caplog):
    rows = [pair("q", "ok"), pair("q" * 20, "k") | {"\x1b]0;owned": 1}]
    data = prepare_rows(rows, characters, max_length=16)
    assert "columns not read: ␛]0;owned" in caplog.text
    assert [data.samples["train"].where(n) for n in range(2)] == ["train:1", "train:2"]
    report = data.reports["train"]
    assert (report.rows, report.samples, report.formats) == (2, 2, ["prompt_completion"])
    assert (report.tokens, report.labelled, report.shortened, report.lost_labels) == (29, 5, 1, 0)
    assert (report.bad_rows, report.dropped, report.duplicates, report.suspicious) == (0, {}, 0, 0)


BAD = [  # a line of a file, and how the reason begins for which it is rejected
    (b'{"text": "Four."}', "no format is recognized by its columns text"),
    (b'{"prompt": "q{", "completion": "k"}', "message 1 (user) contains the control token '{' as text"),
    (b'{"prompt": "q\\ud83d", "completion": "k"}', "message 1 (user) contains half a character"),
    (b'{"prompt": "F\xfcnf", "completion": "k"}', "not UTF-8 text"),
    (b'{"messages": "[{\\"role\\": \\"user\\", \\"role\\": \\"x\\"}]"}', "'messages': not JSON (the key 'role' is"),
    *[(b"no json", "not JSON: Expecting value: line 1 column 1")] * 18,
]


def test_each_bad_row_is_named_with_its_line_and_reason_in_one_error_or_left_out(characters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = [json.dumps(pair(f"q{number}")).encode() for number in range(10)]
    Path("train.jsonl").write_bytes(b"\n".join(line for bad, _ in BAD for line in [*good, bad]))
    with rejects("rows.bad") as error:
        InstructionDataModule("train.jsonl", tokenizer=characters).setup("fit")
    first, *named, alike, more, last = str(error.value).splitlines()
    assert first == "23 rows cannot be used:"
    for at, (found, (_, reason)) in enumerate(zip(named, BAD[:5], strict=True), start=1):
        assert found.startswith(f"  train.jsonl:{11 * at}: {reason}")
    places = ", ".join(f"train.jsonl:{11 * at}" for at in range(6, 21))  # of the first 20 in all
    assert alike.startswith(f"  {places}: not JSON: Expecting value")
    assert (more, last) == ("  and 3 more", "Correct them, or leave them out with `on_bad_row: skip`.")
    data = InstructionDataModule("train.jsonl", tokenizer=characters, on_bad_row="skip")
    data.setup("fit")
    report = data.reports["train"]
    assert (report.rows, report.bad_rows, report.samples) == (11 * len(BAD), len(BAD), 10 * len(BAD))
    assert [read(data.samples["train"], n) for n in range(11)] == [f"{{u\nq{n % 10}}}\n{{a\nk}}\n" for n in range(11)]


def test_a_row_with_too_much_text_is_a_bad_row(characters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with gzip.open("train.jsonl.gz", "wt", compresslevel=1) as file:
        file.writelines(json.dumps(pair(prompt)) + "\n" for prompt in ("q", "x" * 200_000_000, "r"))
    data = InstructionDataModule("train.jsonl.gz", tokenizer=characters, on_bad_row="skip")
    data.setup("fit")
    reason = "more than 64 MB of text or 4 million values, too much for one row: cut it into several"
    assert data.reports["train"].bad == {reason: ["train.jsonl.gz:2"]}
    assert [read(data.samples["train"], n)[3:4] for n in range(2)] == ["q", "r"]
    with rejects("rows.bad", "  train:2: more than 64 MB"):
        prepare_rows([pair(), {"messages": [{"role": "user", "content": "x" * 64_000_001}]}], characters)


def test_rows_left_out_are_counted_by_reason_and_most_rows_must_teach_something(characters, talk):
    unmarked = {"messages": [*talk("q"), {"role": "assistant", "content": "k", "train": False}]}
    rows = [unmarked, pair("q" * 20), *(pair(f"r{number}") for number in range(18)), pair("r1")]
    settings = {"max_length": 16, "too_long": "drop", "deduplicate": True}
    report = prepare_rows(rows, characters, **settings).reports["train"]
    assert (report.rows, report.samples, report.duplicates, report.bad_rows) == (21, 18, 0, 0)
    assert report.unusable == 1  # what is dropped as too long, or twice, was asked for
    reasons = ("every answer is marked `train: false`", "longer than max_length (too_long: drop)")
    assert report.dropped == dict.fromkeys((*reasons, "equal to an earlier row (deduplicate: true)"), 1)
    with rejects("rows.untrained", "1 of 19 rows of train"):
        prepare_rows(rows[:1] + rows[2:20], characters, **settings)


@pytest.mark.parametrize(("too_long", "cut"), [("truncate", [8]), ("split", [8, 8, 7])])
def test_a_document_is_cut_into_pieces_and_tokens_as_their_settings_say(characters, too_long, cut):
    tokens = {"input_ids": [120] * 19, "labels": [120] * 19}
    for name, row, lengths in (("text", {"text": "x" * 19}, [8, 8, 6]), ("tokens", tokens, cut)):
        data = prepare_rows([row], characters, format=name, max_length=8, too_long=too_long)
        assert data.samples["train"].lengths.tolist() == lengths
        assert data.reports["train"].shortened == (lengths == [8])


def test_rows_of_all_kinds_stay_in_their_order(families, talk):
    chatml = families["qwen3"]
    turns = {"messages": talk("q", "<think>\nhm\n</think>\n\na", "r", "b")}  # rendered turn by turn: two texts
    rows = [pair(), {"input_ids": [5, 6], "labels": [5, 6]}, turns, pair("<|im_end|>"), turns, pair("q", "z")]
    samples = prepare_rows(rows, chatml, on_bad_row="skip").samples["train"]
    trained = [chatml.decode([label for label in sample.labels if label != -100]) for sample in unpack(samples)]
    thoughts = ["<think>\nhm\n</think>\n\na<|im_end|>", "b<|im_end|>"]
    assert trained == ["k<|im_end|>", chatml.decode([6]), *thoughts, *thoughts, "z<|im_end|>"]
    assert samples.row_ids.tolist() == [0, 1, 2, 2, 4, 4, 5]
