"""``inspect`` as a user runs it, on real files with SmolLM2's tokenizer: its figures, rows, page and mistakes."""

import json

import pytest
import yaml

from tests.commands.conftest import run_command
from tests.markup import Reader

HOSTILE = "</p><script>alert('1')</script>&amp;\" onmouseover=\"x"
ROWS = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n + 1)))} for n in range(10)]
VAL = [ROWS[4], {"instruction": "Say é🦙.", "output": "é🦙"}, {"instruction": "a", "output": "b"}]
CONFIG = {
    "seed_everything": 3,
    "model": {"base": "tiny", "rank": 2},
    "data": {"train": "train.jsonl", "val": "val.jsonl", "batch_size": 4},
    "gpu_memory": None,
    "trainer": {"devices": 1, "max_epochs": 2, "accumulate_grad_batches": 2, "accelerator": "cpu"},
}


def write(file, rows):
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(bare_folder):
    """The current folder, with a config, its rows, and a base without weights."""
    folder = bare_folder
    hostile = {"instruction": HOSTILE, "output": "Yes\x1b[2J."}
    write(folder / "train.jsonl", [*ROWS, hostile, '{"instruction": "\x1b[2J[bold]"', ROWS[0]])
    write(folder / "val.jsonl", VAL)
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def inspect(*arguments, config="c.yaml"):
    """Run the command; return exit code, what it prints in lines without their breaks, and its error."""
    code, out, err = run_command("inspect", "--config", config, *arguments)
    assert max(map(len, out.splitlines()), default=0) <= 80
    assert "\x1b" not in out
    return code, out, err


def cells(out, name):
    return next(line.removeprefix(name).split() for line in out.splitlines() if line.startswith(f"{name} "))


@pytest.fixture(scope="module")
def report(folder):
    code, out, err = inspect("--html", "page.html", "--row", "1", "--row", "11")
    return code, out, err, (folder / "page.html").read_text(encoding="utf-8")


def test_rows_lengths_and_steps_are_reported_and_the_exit_code_is_that_of_fit(report):
    code, out, err, page = report
    assert code == 2
    assert err.startswith("qlora-lightning: `fit` would not start. 1 row cannot be used:\n  train.jsonl:12: not JSON")
    found = " ".join(out.split())
    for finding in (
        "train: 13 rows (alpaca)",
        "1 bad row on which training stops: train.jsonl:12 (not JSON",
        "1 row equal to an earlier one: train.jsonl:13 = train.jsonl:1 ",
        "val: 3 rows (alpaca)",
        "1 row trained on too, so val_loss is too good: val.jsonl:1 = train.jsonl:5 ",
        "3 batches of 4 rows",
        "2 optimizer steps; 4 in all",
        "stop token <|im_end|> (2) · max_length 2048",
    ):
        assert finding in found
        assert finding in " ".join(Reader(page).text.split())
    # "Count to 0." and its answer, with SmolLM2's system prompt; the longest is the hostile row
    assert cells(out, "train labeled")[0] == "2"


@pytest.mark.parametrize(
    ("options", "expected", "last"),
    [
        (["--data.on_bad_row", "skip"], 0, "`fit` would start on these rows."),
        (["--data.on_bad_row", "skip", "--data.val", "null", "--data.val_fraction", "0.2"], 0, "`fit` would start"),
        # 1 of all 21 rows, as `fit` counts them before it holds some out
        (["--data.train", "few.jsonl", "--data.val", "null", "--data.val_fraction", "0.3"], 0, "`fit` would start"),
        (
            ["--data.train", "untrained.jsonl"],
            2,
            "`fit` would not start. 1 of 13 rows of train leave nothing to train on",
        ),
        (
            ["--data.val", "null", "--data.val_fraction", "0.2", "--split", "val"],
            2,
            "`fit` would not start. 1 row cannot",
        ),
        (["--data.test", "val.jsonl", "--split", "test"], 0, "`test` would start on these rows."),
    ],
)
def test_the_exit_code_and_the_last_line_say_whether_training_would_start(folder, options, expected, last):
    untrained = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a", "train": False}]}
    ]
    write(folder / "untrained.jsonl", [*ROWS, *VAL[1:], *untrained])
    write(folder / "few.jsonl", [*({"instruction": f"{n}?", "output": "a"} for n in range(20)), *untrained])
    code, out, err = inspect(*options)
    assert code == expected
    if code:
        assert err.startswith(f"qlora-lightning: {last}")
        assert "would start" not in out
    else:
        assert (out.splitlines()[-1].startswith(last), err) == (True, "")


def test_a_row_of_a_csv_is_named_by_the_line_where_it_begins_as_an_editor_counts(folder):
    (folder / "lines.csv").write_text('question,answer\n"What\nis 1?",1\n\n"What\n\nis 2?",\n"Is\n3?","3"\n')
    options = ("--data.train", "lines.csv", "--data.val", "lines.csv", "--row", "lines.csv:8")
    code, out, err = inspect(*options)
    assert (code, "lines.csv:5: the answer (message 2) is empty" in err) == (2, True)
    assert "lines.csv:8 " in out
    assert "│3│?│" in out
    assert "lines.csv:2 = lines.csv:2, lines.csv:8 = lines.csv:8" in " ".join(out.split())


def test_rows_are_shown_token_by_token_with_what_is_trained(report):
    _, out, _, page = report
    assert "│Count│ to│ │0│.│<|im_end|>│↵" in out
    assert "⟦0│<|im_end|>■⟧↵" in out
    assert "⟦0│<|im_end|>■⟧↵" in Reader(page).text
    assert {"<|im_end|>", "0"} <= set(Reader(page).texts("span"))


def test_whatever_rows_hold_is_text_and_the_page_needs_nothing_beside_itself(report):
    page = report[-1]
    found = Reader(page)
    assert not {"script", "link"} & {tag for tag, _ in found.elements}
    assert "<script>" in found.text.replace("│", "")
    assert "␛[2J" in found.text.replace("│", "")
    assert "\x1b" not in page


@pytest.mark.slow
def test_rows_of_another_split_by_place_and_length(folder):
    code, out, err = inspect("--split", "val", "--row", "val.jsonl:2", "--longest")
    assert (code, err) == (0, "")
    assert "é│🦙│<|im_end|>■⟧" in out
    assert "val.jsonl:1" in out
    assert "An epoch of train" not in out
    code, out, err = inspect("--split", "val", "--row", "99")
    assert code == 2
    assert "val: 3 rows (alpaca)" in out  # the report says which rows are bad
    assert "--row 99: no row of this split that is left" in err


def test_each_source_is_counted_with_its_share(folder):
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(4)]
    write(folder / "more.jsonl", [*rows, rows[0]])
    write(folder / "texts.jsonl", [{"text": "A long story. " * 40}])
    sources = [{"path": "more.jsonl", "weight": 3}, {"path": "texts.jsonl", "weight": 1, "format": "text"}]
    data = {"train": sources, "max_length": 64, "deduplicate": True, "tokens_per_batch": 128}
    (folder / "sources.yaml").write_text(yaml.safe_dump({"model": {"base": "tiny"}, "data": data}))
    _, out, _ = inspect("--row", "more.jsonl:1", "--trainer.devices", "2", config="sources.yaml")
    assert cells(out, "more.jsonl")[:2] == ["4", "4"]
    assert cells(out, "more.jsonl")[-1] == "75.0%"
    assert cells(out, "texts.jsonl")[:2] == ["1", "3"]
    assert "of up to 128 tokens on each of 2 devices; " in out


def test_rows_to_predict_are_shown_as_generation_begins(folder):
    write(folder / "questions.jsonl", [{"instruction": "Who?"}, {"instruction": "Why?", "output": "So."}])
    _, out, _ = inspect("--data.predict", "questions.jsonl", "--split", "predict", "--row", "2")
    assert "predict: 2 rows" in out
    assert "│<|im_start|>│ass│istant│↵" in out
    assert "So" not in out.partition("Rows of predict")[2]
