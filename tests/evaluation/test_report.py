"""A comparison as people and programs read it: tables, evaluation.json, predictions.jsonl."""

import io
import json
import math

import pytest
from rich.console import Console

from qlora_lightning.evaluation.comparison import Duel, Interval, Measured, compare, duel
from qlora_lightning.evaluation.judge import Answering, EvaluationRow
from qlora_lightning.evaluation.report import (
    describe_duel,
    format_interval,
    metrics_table,
    prediction_lines,
    samples_table,
    summarize,
    write_json,
)


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


def draw(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def measured(percent, base, adapter, difference):
    return Measured(
        percent, {"base": Interval(*base), "adapter": Interval(*adapter)}, {"adapter": Interval(*difference)}
    )


def test_intervals_are_written_as_people_read_them():
    def written(*interval, **options):
        return format_interval(Interval(*interval), **options)

    assert written(0.98, 0.93, 0.994, percent=True) == "98.0 % [93.0, 99.4]"
    assert written(0.98, 0.93, 0.994, percent=True, sign="+") == "+98.0 [93.0, 99.4]"
    assert written(-2.0981, -2.2, -2.01, percent=False, sign="+") == "-2.098 [-2.200, -2.010]"
    assert written(0.0104, 0.008, 0.013, percent=False) == "0.0104 [0.0080, 0.0130]"
    assert written(88.25, 80.0, 96.0, percent=False) == "88.2 [80.0, 96.0]"
    assert written(math.nan, math.nan, math.nan, percent=True) == "–"
    assert written(2.0981, math.nan, math.nan, percent=False) == "2.098"
    assert written(12345.678, 9876.5, 23456.0, percent=False) == "12,345.7 [9,876.5, 23,456.0]"
    assert written(-1e-7, -1e-6, 0.0, percent=True, sign="+") == "+0.0 [0.0, 0.0]"


def test_in_80_columns_an_interval_stands_below_its_value_where_both_do_not_fit():
    figures = {
        "loss": measured(False, (2.0981, 2.01, 2.2), (0.0104, 0.008, 0.013), (-2.0877, -2.2, -1.99)),
        "exact_match": measured(True, (0.0, 0.0, 0.037), (0.98, 0.93, 0.994), (0.98, 0.95, 1.0)),
    }
    narrow, wide = (draw(metrics_table(figures, "100 rows", width), width) for width in (80, 120))
    for text in (narrow, wide):
        for cell in ("[93.0, 99.4]", "+98.0", "[95.0, 100.0]", "-2.0877", "[-2.2000, -1.9900]"):
            assert cell in text
    assert "+98.0 [95.0, 100.0]" in wide
    assert "+98.0 [95.0, 100.0]" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80


def test_a_duel_is_told_in_a_sentence():
    found = Duel("json_f1", wins=[1, 2], losses=[5], ties=3)
    assert describe_duel(found) == "By JSON field F1, the adapter is better on 2 rows, the base on 1; 3 alike."
    assert (
        describe_duel(Duel("loss", [], [], 0), "a") == "By lower loss, a is better on 0 rows, the base on 0; 0 alike."
    )


def test_texts_of_rows_act_on_no_terminal_and_are_cut():
    text = draw(samples_table({"prompt": "[bold]x[/bold] a\x1b[31mred", "base": "z" * 400, "adapter": " \n"}))
    assert "[bold]x[/bold] a␛[31mred" in text
    assert text.count("z") == 300
    assert "(empty)" in text
