"""Which trial a sweep chooses: gains of losses row by row, and their noise."""

import pytest

from qlora_lightning.commands.sweep import Dimension
from qlora_lightning.commands.sweep.choice import Gain, RowLosses, Trial, choose, is_done, measure_gain

RANKS = Dimension("rank", "rank", (8, 16, 32), stops=True)
TARGETS = Dimension("target_modules", "target modules", ("attention", "mlp", "all-linear"))
FLAT, BETTER, NOISY = [1.0] * 6, [0.8] * 6, [0.5, 1.4] * 3


def losses(*nll, tokens=1):
    return RowLosses(list(nll), [tokens] * len(nll))


def trial(value, nll, parameters=10):
    return Trial(f"trial-{value}", value, parameters, 1, 1.0, "same", losses(*nll))


def test_the_gain_is_the_difference_of_the_losses_per_token():
    # 6 nats over 4 tokens against 4 nats over 4 tokens
    gain = measure_gain(RowLosses([4.0, 2.0], [3, 1]), RowLosses([3.0, 1.0], [3, 1]))
    # Of the two rows a draw has both, or one of them twice: 1/3 per token, 1/2, or 1.
    assert gain == pytest.approx((0.5, 1 / 3, 1.0))
    assert gain.pays(0.5)
    assert not gain.pays(0.51)
    assert not Gain(0.0, 0.0, 0.0).pays(0.0)


def test_the_interval_is_that_of_a_mean_of_many_rows_and_the_same_each_time():
    # 400 rows of one token, gains 0 and 1 by turns: the mean is 0.5 with a standard error of 0.5 / 20
    before, after = losses(*[1.0] * 400), losses(*[1.0, 0.0] * 200)
    gain = measure_gain(before, after)
    assert gain.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert gain.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)
    assert measure_gain(before, after) == gain


@pytest.mark.parametrize(
    ("nll", "min_gain", "expected", "begin", "end"),
    [
        ((FLAT, BETTER), 0.3, 8, "Rank 16 gained 0.2000 [", "nats per token over it: less than --min-gain 0.3."),
        ((FLAT, BETTER, NOISY), 0.0, 16, "Rank 32 gained -0.1500 [", "over it: no more than noise."),
        ((BETTER, [1.0, 1.1, 0.9] * 2), 0.0, 8, "Rank 16 lost 0.2000 [0.1", "] nats per token: more than noise."),
        ((FLAT, BETTER, [0.6] * 6), 0.0, 32, "Each rank paid over the one before it: a larger one may pay too.", ""),
    ],
)
def test_ranks_are_tried_while_they_pay_and_the_last_that_paid_is_chosen(nll, min_gain, expected, begin, end):
    trials = [trial(*each) for each in zip(RANKS.values, nll, strict=False)]
    assert not any(is_done(RANKS, trials[:count], min_gain) for count in range(len(trials)))
    assert is_done(RANKS, trials, min_gain)
    chosen, why = choose(RANKS, trials, min_gain)
    assert chosen.value == expected
    assert why.startswith(begin)
    assert why.endswith(end)


@pytest.mark.parametrize(
    ("nll", "parameters", "expected", "words"),
    [
        ((FLAT, FLAT, BETTER), (1, 2, 3), "all-linear", "each other is worse by more than noise"),
        ((NOISY, FLAT, [0.9] * 6), (1, 2, 3), "attention", "fewest parameters of those within noise"),
        ((FLAT, BETTER, NOISY), (5, 5, 5), "mlp", "It has the lowest loss; within noise of it: all-linear."),
    ],
)
def test_of_other_settings_the_smallest_within_noise_of_the_best_is_chosen(nll, parameters, expected, words):
    trials = [trial(*each) for each in zip(TARGETS.values, nll, parameters, strict=True)]
    assert not is_done(TARGETS, trials[:2], 0.0)
    assert is_done(TARGETS, trials, 0.0)
    chosen, why = choose(TARGETS, trials, 0.0)
    assert chosen.value == expected
    assert words in why
