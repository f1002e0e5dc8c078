"""Means, paired differences and intervals, by formula and by hand. As people read them: ``test_evaluate.py``."""

import math

import numpy as np
import pytest

from qlora_lightning.evaluation.comparison import Comparison, compare
from qlora_lightning.evaluation.intervals import measure
from qlora_lightning.evaluation.row_results import Answer, AnswerSettings, EvaluationRow, RowResult
from qlora_lightning.evaluation.scores import find_scores


def result(loss=1.0, tokens=1, correct=0, answer=None, stopped=True, answer_tokens=0, **scores):
    found = None if answer is None else Answer(answer, answer_tokens, stopped, scores)
    return RowResult(loss * tokens, tokens, correct, found, loss * tokens)


def rows_of(results):
    return [EvaluationRow(number, "0", None, []) for number in range(len(results))]


def test_losses_are_weighted_by_tokens_scores_are_means_of_answered_rows_and_differences_are_paired():
    unanswered = result(loss=1.0, tokens=3, correct=3)
    base = [result(loss=2.0, answer="a", exact_match=0.0, chrf=0.5, answer_tokens=4, stopped=False), unanswered]
    adapter = [result(loss=1.0, correct=1, answer="b", exact_match=1.0, chrf=0.75, answer_tokens=2)]
    adapter.append(result(loss=0.0, tokens=3, correct=3))
    metrics = compare({"base": base, "adapter": adapter}, rows_of(base))
    values = {name: (metric.sides["base"].value, metric.sides["adapter"].value) for name, metric in metrics.items()}
    expected = {"loss": (5 / 4, 1 / 4), "perplexity": (math.exp(5 / 4), math.exp(1 / 4))}
    expected |= {"token_accuracy": (3 / 4, 1.0), "exact_match": (0.0, 1.0), "chrf": (0.5, 0.75)}
    expected |= {"stop_rate": (0.0, 1.0), "answer_tokens": (4.0, 2.0)}
    assert list(values) == list(expected)
    for name, pair in expected.items():
        assert values[name] == pytest.approx(pair), name
        assert metrics[name].differences["adapter"].value == pytest.approx(pair[1] - pair[0])
    assert metrics["loss"].sides["base"] == pytest.approx((5 / 4, 1.0, 2.0))
    # Each row is better by exactly one nat a token: so is every resample, which tells nothing of other rows.
    assert metrics["loss"].differences["adapter"] == pytest.approx((-1.0, math.nan, math.nan), nan_ok=True)


def test_pieces_of_a_row_are_one_draw_and_answers_with_a_verdict_are_compared_by_loss(capsys):
    pieces = {"base": [result(loss) for loss in (1, 1, 3, 3, 2)], "adapter": [result(loss) for loss in (1, 2, 2, 1, 1)]}
    scored = {"base": [result(answer="", exact_match=float(right)) for right in (1, 0, 1, 1, 0)]}
    rows = [EvaluationRow(number, "0", None, []) for number in (7, 7, 9, 9, 11)]
    whole = {"base": [result(1, 2), result(3, 2), result(2)], "adapter": [result(1.5, 2), result(1.5, 2), result(1)]}
    assert compare(pieces, rows)["loss"] == compare(whole, rows_of(whole["base"]))["loss"]
    share = compare(scored, rows)["exact_match"].sides["base"]
    assert (share.value, share.low) == pytest.approx((3 / 5, 0.1725), abs=1e-4)  # Wilson's of three rows, not of five
    Comparison(rows, pieces, None).print("rows")
    assert "the adapter is better on 3 samples, the base on 1; 1 alike" in capsys.readouterr().out
    settings = AnswerSettings(None, [0], find_scores("exact_match"), 5, 1)
    assert Comparison(rows, scored | {"adapter": scored["base"]}, settings).figures()["answered_rows"] == 3
    judged = [EvaluationRow(number, "0", None, [], kind="desirable") for number in range(5)]
    found = Comparison(judged, pieces, None)
    assert list(found.metrics) == ["loss"]
    assert found.compare_rows("adapter") == ([2, 3, 4], [1], 1)


def test_to_make_every_answer_likelier_is_no_gain():
    kinds = ["desirable"] * 4 + ["undesirable"]
    rows = [EvaluationRow(number, "0", None, [], kind=kind) for number, kind in enumerate(kinds)]
    losses = {"base": [0.5] * 5, "adapter": [0.4] * 4 + [0.6]}
    found = compare({side: [result(loss) for loss in each] for side, each in losses.items()}, rows)["loss"]
    assert found.differences["adapter"].value == pytest.approx(0.0)
    assert found.sides["adapter"].value == pytest.approx(0.5)


def test_no_interval_says_that_a_share_is_certain():
    base = [result(answer="a", exact_match=0.0)] * 100
    adapter = [result(answer="a", exact_match=1.0)] * 100
    metrics = compare({"base": base, "adapter": adapter}, rows_of(base))
    # (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), by hand for n = 100
    assert metrics["exact_match"].sides["adapter"] == pytest.approx((1.0, 0.9630, 1.0), abs=1e-4)
    assert metrics["exact_match"].sides["base"] == pytest.approx((0.0, 0.0, 0.0370), abs=1e-4)
    assert math.isnan(metrics["exact_match"].differences["adapter"].low)  # nobody knows of other rows
    half = [result(answer="a", exact_match=float(row < 50)) for row in range(100)]
    share = compare({"base": half}, rows_of(half))["exact_match"].sides["base"]
    assert share == pytest.approx((0.5, 0.4038, 0.5962), abs=1e-4)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution_for_many_rows_and_the_same_each_time():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    rows = {"base": [(value, 1.0) for value in values], "other": [(value + 1, 1.0) for value in values[::-1]]}
    found = measure("loss", rows)
    reach = 1.96 * values.std() / math.sqrt(400)
    expected = (values.mean(), values.mean() - reach, values.mean() + reach)
    assert found.sides["base"] == pytest.approx(expected, abs=0.1 * reach)
    gains = 1 + values[::-1] - values  # of each row
    reach = 1.96 * gains.std() / math.sqrt(400)
    assert found.differences["other"] == pytest.approx((1.0, 1 - reach, 1 + reach), abs=0.1 * reach)
    assert measure("loss", rows) == found


def test_rows_are_compared_by_the_score_of_those_answered_or_else_by_the_loss():
    def duel(base, adapter, score):
        rows = [EvaluationRow(10 + number, "0", [1], [2]) for number in range(len(base))]
        settings = AnswerSettings(None, [0], find_scores(score), 5, 1) if score else None
        found = Comparison(rows, {"base": base, "adapter": adapter}, settings).summary(samples=0)
        return found["comparisons"]["adapter"]

    base = [result(answer="x", exact_match=score) for score in (0.0, 1.0, 1.0)] + [result()]
    adapter = [result(answer="y", exact_match=score) for score in (1.0, 0.0, 1.0)] + [result()]
    assert duel(base, adapter, "exact_match") == {"score": "exact_match", "wins": [10], "losses": [11], "ties": 1}
    base, adapter = ([result(loss=loss) for loss in losses] for losses in ((1.0, 2.0, 3.0), (0.5, 2.0, 4.0)))
    assert duel(base, adapter, None) == {"score": "loss", "wins": [10], "losses": [12], "ties": 1}
