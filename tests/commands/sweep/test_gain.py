import pytest

from qlora_lightning.commands.sweep.gain import Gain, measure_gain
from qlora_lightning.commands.sweep.row_losses import RowLosses


def test_the_gain_is_the_difference_of_the_losses_per_token():
    # 6 nats over 4 tokens against 4 nats over 4 tokens
    gain = measure_gain(RowLosses([4.0, 2.0], [3, 1]), RowLosses([3.0, 1.0], [3, 1]))
    assert gain.value == pytest.approx(0.5)
    # Of the two rows a draw has both, or one of them twice: 1/3 per token, 1/2, or 1.
    assert (gain.low, gain.high) == pytest.approx((1 / 3, 1.0))


def test_a_gain_that_is_the_same_in_every_row_has_no_noise():
    gain = measure_gain(RowLosses([2.0] * 5, [1] * 5), RowLosses([1.5] * 5, [1] * 5))
    assert gain == pytest.approx((0.5, 0.5, 0.5))
    assert gain.pays(0.0)
    assert gain.pays(0.5)
    assert not gain.pays(0.51)


def test_a_gain_with_rows_on_both_sides_is_noise_and_is_the_same_each_time():
    before, after = RowLosses([1.0, 3.0] * 8, [1] * 16), RowLosses([2.0, 1.9] * 8, [1] * 16)
    gain = measure_gain(before, after)
    assert gain.value == pytest.approx(0.05)
    assert gain.low < 0 < gain.high
    assert not gain.pays(0.0)
    assert measure_gain(before, after) == gain


def test_the_interval_is_that_of_a_mean_of_many_rows():
    # 400 rows of one token, gains 0 and 1 by turns: the mean is 0.5 with a standard error of 0.5 / 20
    gain = measure_gain(RowLosses([1.0] * 400, [1] * 400), RowLosses([1.0, 0.0] * 200, [1] * 400))
    assert gain.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert gain.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)


def test_a_gain_of_nothing_does_not_pay():
    assert not Gain(0.0, 0.0, 0.0).pays(0.0)
