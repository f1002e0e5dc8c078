import io
import math

from rich.console import Console

from qlora_lightning.evaluation.bootstrap import Interval
from qlora_lightning.evaluation.comparison import Duel, Measured, Part
from qlora_lightning.evaluation.tables import (
    describe_duel,
    format_interval,
    metrics_table,
    parts_table,
    samples_table,
)


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


def test_values_have_the_decimals_that_their_difference_needs():
    near = measured(False, (10.9151, 9.0, 12.0), (10.91, 9.0, 12.0), (-0.0051, -1.0, 1.0))
    text = draw(metrics_table({"loss": near}, "", 160), 160)
    for cell in ("10.9151 [9.0000, 12.0000]", "10.9100", "-0.0051 [-1.0000, 1.0000]"):
        assert cell in text
    alike = measured(False, (10.9, 9.0, 12.0), (10.9, 9.0, 12.0), (0.0, 0.0, 0.0))
    assert "│ 10.9 [9.0, 12.0] │ +0.0 [0.0, 0.0] │" in draw(metrics_table({"loss": alike}, "", 160), 160)


def test_an_answer_of_nothing_but_space_is_called_empty():
    text = draw(samples_table({"expected": "one", "base": "", "adapter": " \n"}))
    assert [line.split("│")[2].strip() for line in text.splitlines()[1:-1]] == ["one", "(empty)", "(empty)"]


def test_parts_show_rows_and_a_dash_where_nothing_was_answered():
    loss = measured(False, (2.0, 1.9, 2.1), (1.0, 0.9, 1.1), (-1.0, -1.1, -0.9))
    text = draw(parts_table({"a.jsonl": Part(7, 7, {"loss": loss})}, "By data set", ["loss", "exact_match"]), width=160)
    assert "a.jsonl" in text
    assert "7" in text
    assert "–" in text
    assert "answered" not in text


def test_scores_of_parts_stand_beside_the_rows_that_they_are_of():
    loss = measured(False, (2.0, 1.0, 3.0), (1.0, 0.5, 1.5), (-1.0, -1.5, -0.5))
    parts = {"a": Part(7, 2, {"loss": loss}), "b": Part(9, 9, {"loss": loss})}
    lines = draw(parts_table(parts, "By data set", ["loss"]), width=160).splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:4]] for line in lines if "│" in line]
    assert cells == [["a", "7", "2"], ["b", "9", "9"]]


def test_a_duel_is_told_in_a_sentence():
    found = Duel("json_f1", wins=[1, 2], losses=[5], ties=3)
    assert describe_duel(found) == "By JSON field F1, the adapter is better on 2 rows, the base on 1; 3 alike."
    assert (
        describe_duel(Duel("loss", [], [], 0), "a") == "By lower loss, a is better on 0 rows, the base on 0; 0 alike."
    )


def test_markup_in_rows_is_shown_as_it_is_and_long_text_is_cut():
    text = draw(samples_table({"prompt": "[bold]x[/bold]", "base": "y" * 400}))
    assert "[bold]x[/bold]" in text
    assert text.count("y") == 300
    assert "…" in text


def test_what_would_act_on_the_terminal_is_shown():
    text = draw(samples_table({"prompt": "a\x1b[31mred"}))
    assert "a␛[31mred" in text
