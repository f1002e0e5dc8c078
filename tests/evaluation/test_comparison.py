"""Means, paired differences and their confidence intervals, by formula and by hand."""

import math

import numpy as np
import pytest

from qlora_lightning.evaluation.comparison import (
    alike_interval,
    compare,
    duel,
    hardest_first,
    percentile_interval,
    resample_sums,
    wilson_interval,
)


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


def test_an_interval_of_a_share_of_rows_is_wilsons(judged):
    rows = [judged(answer="a", exact_match=float(row < 50)) for row in range(100)]
    found = compare({"base": rows, "adapter": rows}, ["exact_match"])["exact_match"].sides["base"]
    assert found == pytest.approx((0.5, 0.4038, 0.5962), abs=1e-4)


def test_no_interval_says_that_a_share_is_certain(judged):
    base = [judged(answer="a", exact_match=0.0, chrf=0.0)] * 100
    adapter = [judged(answer="a", exact_match=1.0, chrf=1.0, correct=1)] * 100
    measured = compare({"base": base, "adapter": adapter}, ["exact_match", "chrf"])
    for name in ("exact_match", "chrf", "token_accuracy", "stop_rate"):
        for interval in (*measured[name].sides.values(), *measured[name].differences.values()):
            assert interval.high - interval.low > 0.03, name
    assert measured["chrf"].differences["adapter"] == pytest.approx((1.0, 0.926, 1.0), abs=1e-4)
    assert math.isnan(measured["loss"].sides["base"].low)


def test_a_duel_counts_rows_by_score_and_leaves_out_what_was_not_answered(judged):
    base = [judged(answer="x", exact_match=score) for score in (0.0, 1.0, 1.0)] + [judged()]
    adapter = [judged(answer="y", exact_match=score) for score in (1.0, 0.0, 1.0)] + [judged()]
    found = duel(base, adapter, "exact_match")
    assert (found.wins, found.losses, found.ties) == ([0], [1], 1)


def test_the_hardest_row_has_the_lowest_score_and_then_the_highest_loss(judged):
    rows = [
        judged(answer="a", loss=9.0, chrf=1.0),
        judged(answer="b", loss=1.0, chrf=0.2),
        judged(answer="c", loss=2.0, chrf=0.2),
    ]
    assert hardest_first(rows, "chrf") == [2, 1, 0]
    assert hardest_first(rows, None) == [0, 2, 1]


def test_resamples_hold_as_many_rows_and_are_the_same_each_time():
    sums = resample_sums(np.ones((7, 2)))
    assert sums.shape == (2000, 2)
    assert (sums == 7).all()
    columns = np.arange(10.0)[:, None]
    assert (resample_sums(columns) == resample_sums(columns)).all()


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution_for_many_rows():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    means = resample_sums(values[:, None])[:, 0] / 400
    interval = percentile_interval(float(values.mean()), means, 400)
    reach = 1.96 * values.std() / math.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - reach, abs=0.1 * reach)
    assert interval.high == pytest.approx(values.mean() + reach, abs=0.1 * reach)


def test_wilson_knows_that_all_of_a_hundred_may_be_luck():
    # (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), by hand for n = 100
    assert wilson_interval(100, 100) == pytest.approx((1.0, 0.9630, 1.0), abs=1e-4)
    assert wilson_interval(0, 100) == pytest.approx((0.0, 0.0, 0.0370), abs=1e-4)
    assert wilson_interval(50, 100) == pytest.approx((0.5, 0.4038, 0.5962), abs=1e-4)


def test_rows_that_are_all_alike_may_be_luck():
    # none of 100 rows is otherwise: z²/(n + z²) of all rows may be, 3.70 %
    assert alike_interval(0.0, 100, (0.0, 1.0)) == pytest.approx((0.0, 0.0, 0.0370), abs=1e-4)
    assert alike_interval(1.0, 100, (0.0, 1.0)) == pytest.approx((1.0, 0.9630, 1.0), abs=1e-4)
    assert alike_interval(0.5, 100, (0.0, 1.0)) == pytest.approx((0.5, 0.4815, 0.5185), abs=1e-4)
    assert alike_interval(1.0, 100, (-1.0, 1.0)) == pytest.approx((1.0, 0.9260, 1.0), abs=1e-4)
    alike = np.full(2000, 0.5) + np.array([0, 1e-16] * 1000)
    assert percentile_interval(0.5, alike, 100, (0.0, 1.0)) == alike_interval(0.5, 100, (0.0, 1.0))
    assert math.isnan(percentile_interval(0.5, alike, 100).low)  # of a loss nobody knows how high it may be elsewhere
