import json

import pytest

from qlora_lightning.evaluation.comparison import compare, duel
from qlora_lightning.evaluation.judge import Answering
from qlora_lightning.evaluation.report import metrics_as_json, prediction_lines, summarize, write_json
from qlora_lightning.evaluation.rows import EvaluationRow


class Letters:
    """A tokenizer of which the ids are code points; 0 is the stop token."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(number) if number else ("" if skip_special_tokens else "<stop>") for number in ids)

    def batch_decode(self, rows, **options):
        return [self.decode(ids, **options) for ids in rows]


def ids(text):
    return [0 if letter == "." else ord(letter) for letter in text]


ROWS = [
    EvaluationRow({}, 7, 0, ids("user\nhi."), ids("ho."), "a.jsonl:8"),
    EvaluationRow({}, 9, 1, None, ids("all."), "b.jsonl:1", group="g"),
]


@pytest.fixture
def found(judged):
    base = [judged(loss=2.0, answer="no", exact_match=0.0, stopped=False), judged(loss=1.0)]
    adapter = [judged(loss=1.0, answer="ho", exact_match=1.0), judged(loss=1.0)]
    return {"base": base, "adapter": adapter}


def test_what_is_left_open_is_chosen_by_the_rows():
    answering = Answering.of(ROWS[:1], Letters(), [0])
    assert (answering.scores, answering.max_new_tokens) == (["exact_match", "rouge_l", "chrf"], 32)
    assert Answering.of(ROWS[:1], Letters(), [0], "exact_match", 5).scores == ["exact_match"]
    assert answering.decode(ids(" ho .")) == "ho"


def test_a_summary_holds_figures_duels_and_samples(found, tmp_path):
    answering = Answering.of(ROWS[:1], Letters(), [0], ["exact_match"], 5)
    measured = compare(found, ["exact_match"])
    duels = {"adapter": duel(found["base"], found["adapter"], "exact_match")}
    summary = summarize(ROWS, found, measured, answering, duels, samples=3)
    assert (summary["rows"], summary["answered_rows"], summary["labelled_tokens"]) == (2, 1, 2)
    assert summary["samples"] == [{"prompt": "hi", "expected": "ho", "base": "no", "adapter": "ho"}]
    assert summary["duels"]["adapter"] == {"score": "exact_match", "wins": [7], "losses": [], "ties": 0}
    assert summary["metrics"]["exact_match"]["difference"]["value"] == 1.0
    assert summary["metrics"]["loss"]["base"]["value"] == pytest.approx(1.5)
    write_json(summary, tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text()) == summary


def test_predictions_hold_whole_prompts_and_each_sides_answer_in_the_order_asked_for(found):
    answering = Answering.of(ROWS[:1], Letters(), [0], ["exact_match"], 5)
    first, second = prediction_lines(ROWS, found, [1, 0], answering, ["a.jsonl"])
    assert (first["row"], first["group"], first["source"]) == (9, "g", "1")
    assert "prompt" not in first
    assert (second["prompt"], second["expected"], second["source"]) == ("user\nhi<stop>", "ho", "a.jsonl")
    assert second["adapter"] == {
        "answer": "ho", "loss": 1.0, "scores": {"exact_match": 1.0}, "labelled_tokens": 1, "correct_tokens": 0,
        "stopped": True, "answer_tokens": 0,
    }  # fmt: skip


def test_a_figure_that_is_no_number_is_null(judged):
    hopeless = compare({"base": [judged(loss=1e4)], "adapter": [judged(loss=1.0)]}, [])
    assert metrics_as_json(hopeless)["perplexity"]["base"]["value"] is None
    assert metrics_as_json(hopeless)["loss"]["base"]["value"] == 1e4
