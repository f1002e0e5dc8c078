import math

import pytest

from qlora_lightning.commands.lr_find.search import suggest_rate


@pytest.mark.parametrize("steps", [20, 40, 100, 400])
def test_the_rate_at_which_the_loss_falls_most_steeply_over_its_logarithm_is_suggested(steps):
    rates = [1e-6 * 10 ** (5 * step / steps) for step in range(steps)]
    losses = [3 / (1 + rate / 1e-3) for rate in rates]  # over log rate: steepest where the rate is 1e-3
    assert math.log10(suggest_rate(rates, losses)) == pytest.approx(-3, abs=5 / steps)


def test_the_first_ten_the_last_and_losses_that_are_not_finite_do_not_count():
    rates = [10.0**step for step in range(-20, 0)]
    losses = [9.0, 1.0, *[5.0] * 8, 4.0, 3.9, math.nan, 3.7, 3.0, 2.9, 2.8, 2.7, 2.6, 0.0]
    assert suggest_rate(rates, losses) == rates[13]  # between 3.9 and 3.0, by central differences
    assert suggest_rate(rates, [math.nan] * 20) is None
    assert suggest_rate(rates[:11], losses[:11]) is None
