import math

import pytest

from qlora_lightning.evaluation.comparison import compare, duel, hardest_first


def test_losses_are_weighted_by_tokens_and_differences_are_paired(judged):
    base = [judged(loss=2.0, tokens=1, correct=0), judged(loss=1.0, tokens=3, correct=3)]
    adapter = [judged(loss=1.0, tokens=1, correct=1), judged(loss=0.0, tokens=3, correct=3)]
    measured = compare({"base": base, "adapter": adapter}, [])
    assert list(measured) == ["loss", "perplexity", "token_accuracy"]
    loss = measured["loss"]
    assert loss.sides["base"].value == pytest.approx(5 / 4)
    assert loss.sides["adapter"].value == pytest.approx(1 / 4)
    # Each row is better by exactly one nat a token: so is every resample, which tells nothing of other rows.
    assert loss.differences["adapter"] == pytest.approx((-1.0, math.nan, math.nan), nan_ok=True)
    assert loss.sides["base"].low == pytest.approx(1.0)
    assert loss.sides["base"].high == pytest.approx(2.0)
    assert measured["perplexity"].sides["base"].value == pytest.approx(math.exp(5 / 4))
    assert measured["token_accuracy"].sides["base"].value == pytest.approx(3 / 4)


def test_scores_are_means_over_the_rows_that_were_answered(judged):
    base = [judged(answer="a", exact_match=0.0, chrf=0.5, answer_tokens=4, stopped=False), judged(loss=3.0)]
    adapter = [judged(answer="b", exact_match=1.0, chrf=0.75, answer_tokens=2), judged(loss=3.0)]
    measured = compare({"base": base, "adapter": adapter}, ["exact_match", "chrf"])
    assert measured["loss"].sides["base"].value == pytest.approx(2.0)
    assert measured["exact_match"].differences["adapter"].value == 1.0
    assert measured["chrf"].sides["adapter"].value == pytest.approx(0.75)
    assert measured["stop_rate"].sides["base"].value == 0.0
    assert measured["answer_tokens"].differences["adapter"].value == -2.0


def test_an_interval_of_a_share_is_wilsons_and_of_another_mean_a_bootstraps(judged):
    rows = [judged(answer="a", exact_match=1.0, chrf=1.0)] * 100
    rows = [*rows, judged(answer="a", exact_match=1.0, chrf=0.0)]
    measured = compare({"base": rows, "adapter": rows}, ["exact_match", "chrf"])
    assert measured["exact_match"].sides["base"].low == pytest.approx(0.963, abs=1e-3)
    assert measured["chrf"].sides["base"].high == 1.0


def test_no_interval_says_that_a_share_is_certain(judged):
    base = [judged(answer="a", exact_match=0.0, chrf=0.0)] * 100
    adapter = [judged(answer="a", exact_match=1.0, chrf=1.0, correct=1)] * 100
    measured = compare({"base": base, "adapter": adapter}, ["exact_match", "chrf"])
    for name in ("exact_match", "chrf", "token_accuracy", "stop_rate"):
        for interval in (*measured[name].sides.values(), *measured[name].differences.values()):
            assert interval.high - interval.low > 0.03, name
    assert measured["chrf"].differences["adapter"] == pytest.approx((1.0, 0.926, 1.0), abs=1e-4)
    assert math.isnan(measured["loss"].sides["base"].low)


def test_several_adapters_are_each_compared_with_the_base(judged):
    sides = {"base": [judged(loss=3.0)], "a": [judged(loss=2.0)], "b": [judged(loss=5.0)]}
    differences = compare(sides, [])["loss"].differences
    assert {name: interval.value for name, interval in differences.items()} == {"a": -1.0, "b": 2.0}


def test_a_duel_counts_rows_by_score_and_leaves_out_what_was_not_answered(judged):
    base = [judged(answer="x", exact_match=score) for score in (0.0, 1.0, 1.0)] + [judged()]
    adapter = [judged(answer="y", exact_match=score) for score in (1.0, 0.0, 1.0)] + [judged()]
    found = duel(base, adapter, "exact_match")
    assert (found.wins, found.losses, found.ties) == ([0], [1], 1)


def test_without_a_score_the_loss_decides(judged):
    found = duel([judged(loss=2.0), judged(loss=1.0)], [judged(loss=1.0), judged(loss=1.5)], None)
    assert (found.score, found.wins, found.losses, found.ties) == ("loss", [0], [1], 0)


def test_the_hardest_row_has_the_lowest_score_and_then_the_highest_loss(judged):
    rows = [
        judged(answer="a", loss=9.0, chrf=1.0),
        judged(answer="b", loss=1.0, chrf=0.2),
        judged(answer="c", loss=2.0, chrf=0.2),
    ]
    assert hardest_first(rows, "chrf") == [2, 1, 0]
    assert hardest_first(rows, None) == [0, 2, 1]


def test_a_loss_beyond_floats_is_no_error(judged):
    measured = compare({"base": [judged(loss=1e4)], "adapter": [judged(loss=1.0)]}, [])
    assert math.isinf(measured["perplexity"].sides["base"].value)
