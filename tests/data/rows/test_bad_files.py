"""A file of good rows with bad ones of every kind among them, through the data module and the command."""

import json
from pathlib import Path

import pytest
import yaml

from qlora_lightning.cli import main
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.support.errors import UserError

GOOD = 200
ASK, ANSWER = {"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}


def row(*messages):
    return json.dumps({"messages": list(messages)}).encode()


def answered(content):
    return row(ASK, {"role": "assistant", "content": content})


# a line of the file, and how the reason begins for which it is refused
BAD = [
    (b"no json", "not JSON: Expecting value: line 1 column 1"),
    (row(ASK, ANSWER)[:60], "not JSON: Expecting property name"),
    (b'["messages"]', "list, expected a JSON object"),
    (b'{"text": "Four."}', "no format is recognised by its columns text"),
    (b'{"messages": null}', "'messages' is missing or null"),
    (answered(None), "the assistant content of message 2 must be a string, found null"),
    (answered(4), "the assistant content of message 2 must be a string, found int"),
    (answered(" \n"), "the answer (message 2) is empty"),
    (row(ASK, {"role": "oracle", "content": "Four."}), "message 2 has the role 'oracle', expected system, user"),
    (row(ANSWER, ASK), "the conversation must begin with a user turn, found assistant"),
    (row(ASK), "no assistant turn"),
    (row(ASK, ANSWER).replace(b"Four", b"F\xfcnf"), "not UTF-8 text"),
    (row(ASK, ANSWER).replace(b"Four", b"Fo\0r"), "not JSON: Invalid control character"),
]


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """Write train.jsonl: a bad row after every ten good ones; gives the lines on which bad ones stand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    content = []
    for number in range(GOOD):
        content.append(row({**ASK, "content": f"{number} and two?"}, ANSWER))
        if number % 10 == 9 and number // 10 < len(BAD):
            content.append(BAD[number // 10][0])
    Path("train.jsonl").write_bytes(b"\n".join(content))
    return [11 * (at + 1) for at in range(len(BAD))]


def check_list(message, lines):
    """Every bad row is named with its line and its reason, in file order."""
    first, *named, last = message.splitlines()
    assert first.endswith(f"{len(BAD)} rows cannot be used:")
    assert last == "Correct them, or leave them out with `on_bad_row: skip`."
    for line, found, (_, reason) in zip(lines, named, BAD, strict=True):
        assert found.startswith(f"  train.jsonl:{line}: {reason}")
        assert len(found) < 300


@pytest.mark.parametrize("streaming", [False, True])
def test_each_bad_row_is_named_in_one_error(characters, lines, streaming):
    with pytest.raises(UserError) as error:
        InstructionDataModule("train.jsonl", tokenizer=characters, streaming=streaming).setup("fit")
    check_list(str(error.value), lines)


@pytest.mark.parametrize("streaming", [False, True])
def test_where_bad_rows_are_skipped_the_good_ones_are_left(characters, lines, streaming):
    data = InstructionDataModule("train.jsonl", tokenizer=characters, on_bad_row="skip", streaming=streaming)
    data.setup("fit")
    report = data.reports["train"]
    assert (report.rows, report.bad_rows, report.samples) == (GOOD + len(BAD), len(BAD), GOOD)
    said = ["".join(map(chr, sample.ids.tolist())) for sample in data.samples["train"]]
    assert all(text.startswith(f"{{u\n{number} and two?") for number, text in enumerate(said))
    assert [bad.where for bad in report.bad] == [f"train.jsonl:{line}" for line in lines]


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_source_without_rows_is_refused_in_any_case(characters, lines, on_bad_row):
    Path("blank.jsonl").write_text("\n\n")
    for train in ("blank.jsonl", ["train.jsonl", "blank.jsonl"]):
        with pytest.raises(UserError, match=r"blank\.jsonl is empty: it holds no rows"):
            InstructionDataModule(train, tokenizer=characters, on_bad_row=on_bad_row).setup("fit")


def test_the_command_names_them_too_and_gives_2(lines, tiny_base, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    model = {"base": str(tiny_base), "rank": 2, "quantization": "none", "compute_dtype": "fp32"}
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "default_root_dir": "run"}
    data = {"train": "train.jsonl", "batch_size": 4}
    Path("c.yaml").write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer}))
    assert main(["fit", "--config", "c.yaml"]) == 2
    error = capsys.readouterr().err
    check_list(error[error.index("qlora-lightning:") :].strip(), lines)
    assert not Path("run").exists()
