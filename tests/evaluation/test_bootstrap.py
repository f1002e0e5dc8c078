import math

import numpy as np
import pytest

from qlora_lightning.evaluation.bootstrap import (
    alike_interval,
    percentile_interval,
    resample_sums,
    wilson_interval,
)


def test_resamples_hold_as_many_rows_and_are_the_same_each_time():
    sums = resample_sums(np.ones((7, 2)))
    assert sums.shape == (2000, 2)
    assert (sums == 7).all()
    columns = np.arange(10.0)[:, None]
    assert (resample_sums(columns) == resample_sums(columns)).all()


def test_columns_share_their_rows():
    column = np.arange(10.0)
    sums = resample_sums(np.stack([column, 3 * column], axis=1))
    assert sums[:, 1] == pytest.approx(3 * sums[:, 0])


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


def test_the_interval_of_a_share_ends_at_0_and_1():
    for rows in range(1, 400):
        none, all_ = wilson_interval(0, rows), wilson_interval(rows, rows)
        assert (str(none.low), all_.high) == ("0.0", 1.0)
        assert 0 < none.high < 1
        assert 0 < all_.low < 1


def test_rows_that_are_all_alike_may_be_luck():
    # none of 100 rows is otherwise: z²/(n + z²) of all rows may be, 3.70 %
    assert alike_interval(0.0, 100, (0.0, 1.0)) == pytest.approx((0.0, 0.0, 0.0370), abs=1e-4)
    assert alike_interval(1.0, 100, (0.0, 1.0)) == pytest.approx((1.0, 0.9630, 1.0), abs=1e-4)
    assert alike_interval(0.5, 100, (0.0, 1.0)) == pytest.approx((0.5, 0.4815, 0.5185), abs=1e-4)
    assert alike_interval(1.0, 100, (-1.0, 1.0)) == pytest.approx((1.0, 0.9260, 1.0), abs=1e-4)
    alike = np.full(2000, 0.5) + np.array([0, 1e-16] * 1000)
    assert percentile_interval(0.5, alike, 100, (0.0, 1.0)) == alike_interval(0.5, 100, (0.0, 1.0))
    assert math.isnan(percentile_interval(0.5, alike, 100).low)  # of a loss nobody knows how high it may be elsewhere


def test_without_rows_there_is_no_number():
    assert all(map(math.isnan, wilson_interval(0, 0)))
    assert math.isnan(percentile_interval(math.nan, np.full(2000, math.nan), 0).low)
