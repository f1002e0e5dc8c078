"""``inspect`` as a user runs it, on real files with SmolLM2's tokenizer: its figures, rows, page and mistakes."""

import contextlib
import io
import json
import shutil

import pytest
import yaml

from qlora_lightning.base.folder import load_tokenizer
from qlora_lightning.cli import main
from qlora_lightning.commands.inspection.overview import count_ends
from qlora_lightning.commands.inspection.tokens import mark_tokens
from tests.flat import gather
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
    **{"ckpt_path": None, "weights_only": None, "verbose": True},  # as in the config.yaml of a run folder
}


def write(file, rows):
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    """A folder with a config, its rows, and a base without weights."""
    folder = tmp_path_factory.mktemp("inspect")
    shutil.copytree(tiny_base, folder / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
    hostile = {"instruction": HOSTILE, "output": "Yes\x1b[2J."}
    write(folder / "train.jsonl", [*ROWS, hostile, '{"instruction": "\x1b[2J[bold]"', ROWS[0]])
    write(folder / "val.jsonl", VAL)
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "1")
        yield folder


def inspect(*arguments, config="c.yaml"):
    """Run the command; return exit code, what it prints in lines without their breaks, and its error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["inspect", "--config", config, *arguments])
    assert max(map(len, out.getvalue().splitlines()), default=0) <= 80
    assert "\x1b" not in out.getvalue()
    return code, out.getvalue(), err.getvalue()


def cells(out, name):
    return next(line.removeprefix(name).split() for line in out.splitlines() if line.startswith(f"{name} "))


def joined(out):
    """Return what was printed without the breaks and margins of long rows."""
    return out.replace("\n  ", "")


@pytest.fixture(scope="module")
def report(folder):
    code, out, err = inspect("--html", "page.html", "--row", "1", "--row", "11", "--row", "12", "--row", "99")
    return code, out, err, (folder / "page.html").read_text(encoding="utf-8")


def test_rows_samples_tokens_and_steps_are_counted(report):
    _, out, _, page = report
    counts = {
        **{"formats": ["alpaca", "alpaca"], "rows read": ["13", "3"], "bad rows": ["1", "0"]},
        **{"samples": ["12", "3"], "with a stop token": ["12", "3"], "duplicates": ["1", "0"]},
        **{"also in train": ["0", "1"], "batches": ["3", "of", "4", "rows"]},
    }
    text = Reader(page).text
    for name, expected in counts.items():
        assert cells(out, name) == expected
        assert cells(text, name) == expected
    assert "2, a step every 2; 4 in all" in out
    assert "stop token <|im_end|> (2) · max_length 2048" in " ".join(out.split())


def test_what_a_user_should_look_at_is_listed_and_the_exit_code_is_that_of_fit(report):
    code, out, err, page = report
    assert code == 2
    assert err.startswith("qlora-lightning: There are bad rows (1 in train), listed above: `fit` stops at them.")
    for finding in (
        "train: 1 bad rows\n  train.jsonl:12: not JSON",
        "train: 1 rows equal to an earlier one\n  train.jsonl:13 = train.jsonl:1\n",
        "val: 1 rows also in train, so val_loss is too good\n  val.jsonl:1 = train.jsonl:5\n",
    ):
        assert finding in out
        for line in finding.split("\n  "):
            assert line.strip() in Reader(page).text


def test_rows_are_shown_token_by_token_with_what_is_trained(report):
    _, out, _, page = report
    assert "│Count│ to│ │0│.│<|im_end|>│↵" in joined(out)
    assert "⟦0│<|im_end|>■⟧↵" in joined(out)
    assert "train.jsonl:12  bad row: not JSON" in out
    assert "train 99  no row begins in this line" in out
    assert "⟦0│<|im_end|>■⟧↵" in joined(Reader(page).text)
    assert {"<|im_end|>", "0"} <= set(Reader(page).texts("span"))


def test_whatever_rows_hold_is_text_and_the_page_needs_nothing_beside_itself(report):
    page = report[-1]
    found = Reader(page)
    assert not {"script", "img", "a", "iframe"} & {tag for tag, _ in found.elements}
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert "<script>" in found.text.replace("│", "")
    assert "␛[2J" in found.text.replace("│", "")
    assert "\x1b" not in page
    for reference in ("http:", "https:", "src=", "href=", "url(", "@import", "@font-face"):
        assert reference not in page
    policy = [own["content"] for own in found.of("meta") if own.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_rows_of_another_split_by_place_length_and_text(folder):
    code, out, err = inspect("--split", "val", "--row", "val.jsonl:2", "--longest")
    assert (code, err) == (0, "")
    assert "é│🦙│<|im_end|>■⟧" in joined(out)
    assert "val.jsonl:1" in out
    assert "labelled, the longest" in out
    assert "An epoch of train" not in out


def test_each_source_is_counted_with_its_share_and_cut_answers_are_reported(folder):
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
    assert "1: equal to an earlier row (deduplicate: true)" in out
    assert "texts.jsonl:1" not in out
    assert "of up to 128 tokens on each of 2 devices" in out


def test_samples_without_a_stop_token_are_reported(folder):
    _, out, _ = inspect("--data.max_length", "45", "--data.on_bad_row", "skip", "--split", "train")
    assert "without a stop token\n  they do not teach the model to stop" in out
    assert "answers were cut" in out


def test_rows_to_predict_are_shown_as_generation_begins(folder):
    write(folder / "questions.jsonl", [{"instruction": "Who?"}, {"instruction": "Why?", "output": "So."}])
    _, out, _ = inspect("--data.predict", "questions.jsonl", "--split", "predict", "--row", "2")
    assert cells(out, "rows read") == ["2"]
    assert "│<|im_start|>│ass│istant│↵" in joined(out)
    assert "So" not in out.partition("Rows of predict")[2]
    assert "without a stop token" not in out


def test_stop_tokens_count_if_they_are_labelled_and_a_bos_at_the_start_alone():
    def ends(*texts):
        samples = []
        for number, text in enumerate(texts):
            prompt, _, answer = text.partition("<")
            ids = [ord(character) for character in prompt + answer]
            samples.append((ids, [-100] * len(prompt) + ids[len(prompt) :], number))
        return count_ends(gather(*samples), [ord("}")], ord("^"))

    assert ends("{q}<a}", "{q}<a", "{q}<a}b}", "q}<ab") == (2, 0, 0)
    assert ends("^q^<a}", "^^q<a}", "q^<a}", "^") == (3, 3, 1)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("<think>\nhm</think>a", "<think>\nhm</think>"),
        ("<tool_call>f(1)</tool_call>", "<tool_call>f(1)</tool_call>"),
        ("a\n<think>cut<|im_end|>next", "<think>cut"),  # to the end of its turn
        ("a<b>c</b></think>", ""),
    ],
)
def test_reasoning_and_tool_calls_have_a_colour(smollm2_folder, text, part):
    tokenizer = load_tokenizer(str(smollm2_folder))
    ids = tokenizer.encode(f"<|im_start|>q<|im_end|>{text}<|im_end|>", add_special_tokens=False)
    marked = mark_tokens(ids, [False] * len(ids), tokenizer, [2])
    coloured = "".join(marked.plain[span.start : span.end] for span in marked.spans if span.style == "cyan")
    assert coloured.replace("↵", "") == part
