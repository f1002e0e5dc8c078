import pytest

from qlora_lightning.data import prepare
from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.prepare import TOO_LONG, Preparer, Recipe, prepare_prompts, prepare_samples
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.formats import RowConverter
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.data.samples import SampleSetBuilder
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
    samples, report = prepare_samples(
        source(make_rows(pair("q", "ok"), pair("q" * 20, "k"))), recipe(max_length=16), "train"
    )
    assert read(samples, 0) == "{u\nq}\n{a\nok}\n"
    assert samples[0].labels.tolist() == [-100] * 9 + [111, 107, 125, -100]
    assert read(samples, 1) == "{u\nqqqqqq}\n{a\nk}"  # of 31 tokens
    assert [samples.where(n) for n in range(2)] == ["a.jsonl:1", "a.jsonl:2"]
    assert report == Report(
        "train", rows=2, samples=2, formats=["prompt_completion"], tokens=29, labelled=5, shortened=1, lost_tokens=15
    )


def test_an_answer_cut_short_is_counted(recipe):
    _, report = prepare_samples(source(make_rows(pair("q", "k" * 20))), recipe(max_length=16), "train")
    assert (report.shortened, report.lost_tokens, report.lost_labels) == (1, 15, 14)  # 7 of 21 are left, without }


def test_bad_rows_are_reported_with_their_place_and_left_out(recipe):
    rows = make_rows(pair(), pair("q", ""), {"prompt": "q"}, BadRow("a.jsonl:4", "not JSON"), pair("{", "k"), pair())
    samples, report = prepare_samples(source(rows), recipe(), "train")
    assert samples.row_ids.tolist() == [0, 5]
    assert (report.rows, report.samples, report.bad_rows) == (6, 2, 4)
    assert report.bad == [
        ("a.jsonl:2", "the answer (message 2) is empty"),
        ("a.jsonl:3", "lacks 'completion' of the format prompt_completion (found prompt)"),
        ("a.jsonl:4", "not JSON"),
        ("a.jsonl:5", "message 1 (user) contains the control token '{' as text, which would end or begin a turn there"),
    ]


def test_the_first_20_bad_rows_are_kept(recipe):
    bad = [BadRow(f"a.jsonl:{line}", "empty") for line in range(1, 26)]
    _, report = prepare_samples(source(bad), recipe(), "train")
    assert report.bad_rows == 25
    assert [row.where for row in report.bad] == [f"a.jsonl:{line}" for line in range(1, 21)]


def test_a_template_that_cannot_be_used_names_the_row(recipe, characters):
    characters.apply_chat_template = lambda messages, **kwargs: " ".join(m["content"] for m in messages) + " "
    with pytest.raises(UserError, match=r"^a.jsonl:1: the model would never learn to stop"):
        prepare_samples(source(make_rows(pair())), recipe(), "train")


def spoken(**marks):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "k", **marks}]}


def test_rows_without_a_label_are_dropped_and_counted(recipe):
    samples, report = prepare_samples(source(make_rows(spoken(train=False), *[spoken()] * 19)), recipe(), "train")
    assert (len(samples), report.rows, report.bad_rows) == (19, 20, 0)
    assert report.dropped == {"every answer is marked `train: false`": 1}
    assert report.unusable == 1


def test_rows_dropped_as_too_long_were_asked_for(recipe):
    rows = make_rows(pair("q" * 20), pair(), pair("q" * 30))
    samples, report = prepare_samples(source(rows), recipe(max_length=16, too_long="drop"), "train")
    assert samples.row_ids.tolist() == [1]
    assert report.dropped == {TOO_LONG: 2}


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


def test_chunks_change_nothing_but_when_progress_is_told(recipe, monkeypatch):
    files = [make_rows(*[pair(f"q{n}") for n in range(5)]), make_rows({"prompt": "q"}, pair("z"), file="b.jsonl")]
    rows = [source(file)[0] for file in files]
    whole, report = prepare_samples(rows, recipe(), "train")
    monkeypatch.setattr(prepare, "CHUNK", 2)
    told = []
    samples, again = prepare_samples(rows, recipe(), "train", told.append)
    assert told == [2, 4, 5, 7]
    assert again == report
    assert samples.ids.tolist() == whole.ids.tolist()
    assert samples.source.tolist() == [0, 0, 0, 0, 0, 1]
    assert samples.row_ids.tolist() == [0, 1, 2, 3, 4, 6]
    assert samples.where(5) == "b.jsonl:2"


def test_each_file_has_its_own_format(recipe):
    alpaca = make_rows({"instruction": "q", "output": "k"}, file="b.jsonl")
    samples, report = prepare_samples(source([*make_rows(pair()), *alpaca]), recipe(), "train")
    assert report.formats == ["prompt_completion", "alpaca"]
    assert (report.duplicates, report.duplicate_pairs) == (1, [("b.jsonl:1", "a.jsonl:1")])
    assert read(samples, 0) == read(samples, 1)


def test_columns_under_other_names_must_be_there_where_asked(recipe):
    rows = make_rows({"ask": "q", "completion": "k"})
    samples, report = prepare_samples(source(rows, columns={"ask": "prompt"}), recipe(), "train")
    assert (len(samples), report.formats) == (1, ["prompt_completion"])
    with pytest.raises(UserError, match="columns: no row has 'asks'"):
        prepare_samples(
            source(make_rows({"ask": "q", "completion": "k"}), columns={"asks": "prompt"}), recipe(), "train"
        )
    samples, _ = prepare_samples(source(make_rows(pair()), columns={"asks": "prompt"}), recipe(), "val")
    assert len(samples) == 1


def test_rows_can_be_added_from_any_number_on(recipe):
    report, builder = Report("train"), SampleSetBuilder()
    for number, first_row, rows in ((1, 40, [pair(), pair()]), (0, 42, [pair()])):
        preparer = Preparer(recipe(), RowConverter(RowSettings()), number, report)
        preparer.add(make_rows(*rows), first_row, builder)
    samples = builder.build()
    assert samples.row_ids.tolist() == [40, 41, 42]
    assert samples.source.tolist() == [1, 1, 0]


def test_no_rows_make_no_samples(recipe):
    samples, report = prepare_samples(source([]), recipe(), "val")
    assert (len(samples), report) == (0, Report("val"))


def test_prompts_keep_the_answer_as_reference(recipe):
    rows = make_rows(pair("q", "ok"), {"prompt": "r"}, {"prompt": 7})
    prompts, report = prepare_prompts(source(rows), recipe(), "predict")
    assert ["".join(map(chr, prompt.ids)) for prompt in prompts] == ["{u\nq}\n{a\n", "{u\nr}\n{a\n"]
    assert [prompt.reference for prompt in prompts] == ["ok", None]
    assert (prompts[1].values, prompts[1].file, prompts[1].line, prompts[1].row_id) == (
        {"prompt": "r"},
        "a.jsonl",
        2,
        1,
    )
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
