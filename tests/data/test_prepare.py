import pytest

from qlora_lightning.data.chat import ChatRenderer
from qlora_lightning.data.prepare import Recipe, count_samples, prepare_prompts, prepare_samples
from qlora_lightning.data.reader import Row
from qlora_lightning.errors import UserError


@pytest.fixture
def recipe(characters):
    return lambda **kwargs: Recipe(ChatRenderer(characters), **kwargs)


def make_rows(*values):
    return [Row(value, "a.jsonl", line) for line, value in enumerate(values, start=1)]


def test_rows_become_samples_and_a_report(recipe):
    rows = make_rows({"prompt": "q", "completion": "ok"}, {"prompt": "q" * 20, "completion": "k"})
    bad = []
    samples, report = prepare_samples(rows, recipe(max_length=16), bad)
    assert (bad, [sample.row_id for sample in samples]) == ([], [0, 1])
    assert "".join(map(chr, samples[0].ids.tolist())) == "{u\nq}\n{a\nok}\n"
    assert len(samples[1].ids) == 16
    assert report.describe("train") == "train: 2 rows (prompt_completion), 29 tokens, 17% labelled, 1 shortened"
    assert count_samples(samples, ["x"]).describe("val") == "val: 2 rows (x), 29 tokens, 17% labelled"


def test_bad_rows_are_collected_with_their_place_and_counted(recipe):
    rows = make_rows({"prompt": "q", "completion": "k"}, {"prompt": "q", "completion": ""}, {"prompt": "q"})
    bad = []
    samples, report = prepare_samples(rows, recipe(), bad)
    assert len(samples) == 1
    assert [row.where for row in bad] == ["a.jsonl:2", "a.jsonl:3"]
    assert "2 dropped (1 of them: the answer (message 2) is empty" in report.describe("train")


def test_a_template_that_cannot_be_used_names_the_row(recipe, characters):
    characters.apply_chat_template = lambda messages, **kwargs: " ".join(m["content"] for m in messages) + " "
    with pytest.raises(UserError, match=r"^a.jsonl:1: the model would never learn to stop"):
        prepare_samples(make_rows({"prompt": "q", "completion": "k"}), recipe(), [])


def test_rows_without_a_label_are_counted_and_too_many_are_refused(recipe, monkeypatch):
    rows = make_rows(*[{"prompt": "q", "completion": "k" if number else "kk"} for number in range(30)])
    monkeypatch.setattr(
        "qlora_lightning.data.prepare.shorten",
        lambda ids, labels, most: (ids, labels if len(ids) == 12 else [-100] * len(ids)),
    )
    samples, report = prepare_samples(rows, recipe(), [])
    assert len(samples) == 29
    assert "1 dropped (1 of them: no labelled token left)" in report.describe("train")
    with pytest.raises(UserError, match="1 of 10 rows have no labelled token left"):
        prepare_samples(rows[:10], recipe(), [])


def test_prompts_keep_the_answer_as_reference(recipe):
    rows = make_rows({"prompt": "q", "completion": "ok"}, {"prompt": "r"})
    prompts, report = prepare_prompts(rows, recipe(), [])
    assert ["".join(map(chr, prompt.ids)) for prompt in prompts] == ["{u\nq}\n{a\n", "{u\nr}\n{a\n"]
    assert [prompt.reference for prompt in prompts] == ["ok", None]
    assert prompts[1].values == {"prompt": "r"}
    assert report.describe("predict") == "predict: 2 rows (prompt_completion), 18 tokens"
