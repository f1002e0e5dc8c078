import pytest

from qlora_lightning.commands.sweep.choice import choose, is_done
from qlora_lightning.commands.sweep.dimensions import Dimension
from qlora_lightning.commands.sweep.row_losses import RowLosses
from qlora_lightning.commands.sweep.trial import Trial

RANKS = Dimension("rank", "rank", (8, 16, 32), stops=True)
TARGETS = Dimension("target_modules", "target modules", ("attention", "mlp", "all-linear"))


def trial(value, losses, parameters=10):
    return Trial(f"trial-{value}", value, parameters, 1, 1.0, "same", RowLosses(losses, [1] * len(losses)))


FLAT, BETTER, NOISY = [1.0] * 6, [0.8] * 6, [0.5, 1.4] * 3


def test_ranks_go_on_while_they_pay():
    trials = [trial(8, FLAT)]
    assert not is_done(RANKS, trials, 0.0)
    trials.append(trial(16, BETTER))
    assert not is_done(RANKS, trials, 0.0)
    assert is_done(RANKS, trials, 0.3)  # it gained 0.2
    assert choose(RANKS, trials, 0.3)[0].value == 8
    trials.append(trial(32, NOISY))
    assert is_done(RANKS, trials, 0.0)
    chosen, why = choose(RANKS, trials, 0.0)
    assert chosen.value == 16
    assert why.startswith("Rank 32 gained -0.1500 [")
    assert why.endswith("nats per token over it: no more than noise.")


def test_a_rank_that_is_worse_by_more_than_noise_is_said_to_have_lost():
    trials = [trial(8, BETTER), trial(16, [1.0, 1.1, 0.9, 1.0, 1.1, 0.9])]
    chosen, why = choose(RANKS, trials, 0.0)
    assert chosen.value == 8
    assert why.startswith("Rank 16 lost 0.2000 [0.1")
    assert why.endswith("] nats per token: more than noise.")


def test_where_all_ranks_paid_the_last_is_chosen_and_more_may_pay():
    trials = [trial(8, FLAT), trial(16, BETTER), trial(32, [0.6] * 6)]
    chosen, why = choose(RANKS, trials, 0.0)
    assert (chosen.value, why) == (32, "Each rank paid over the one before it: a larger one may pay too.")


@pytest.mark.parametrize(
    ("losses", "parameters", "expected", "words"),
    [
        ((FLAT, FLAT, BETTER), (1, 2, 3), "all-linear", "each other is worse by more than noise"),
        ((NOISY, FLAT, [0.9] * 6), (1, 2, 3), "attention", "fewest parameters of those within noise"),
        ((FLAT, BETTER, NOISY), (5, 5, 5), "mlp", "It has the lowest loss; all-linear is within noise of it."),
    ],
)
def test_of_other_settings_the_smallest_within_noise_of_the_best_is_chosen(losses, parameters, expected, words):
    trials = [trial(*each) for each in zip(TARGETS.values, losses, parameters, strict=True)]
    assert not is_done(TARGETS, trials[:2], 0.0)
    assert is_done(TARGETS, trials, 0.0)
    chosen, why = choose(TARGETS, trials, 0.0)
    assert chosen.value == expected
    assert words in why
