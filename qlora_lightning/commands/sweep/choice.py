"""Which of the trials is chosen, and why."""

from collections.abc import Sequence

from qlora_lightning.commands.sweep.dimensions import Dimension, show_value
from qlora_lightning.commands.sweep.gain import Gain, measure_gain
from qlora_lightning.commands.sweep.trial import Trial


def is_done(dimension: Dimension, trials: Sequence[Trial], min_gain: float) -> bool:
    """Whether no further value needs to be tried."""
    if len(trials) == len(dimension.values):
        return True
    return dimension.stops and len(trials) > 1 and not gain_of_last(trials).pays(min_gain)


def gain_of_last(trials: Sequence[Trial]) -> Gain:
    """Give the gain of the last trial over the one before it."""
    return measure_gain(trials[-2].rows, trials[-1].rows)


def choose(dimension: Dimension, trials: Sequence[Trial], min_gain: float) -> tuple[Trial, str]:
    """Choose a trial, and say why in a sentence or two.

    Of ranks, it is the last one that paid over the one before it. Of anything else, it is the one with the fewest
    parameters among those that the best does not beat by more than noise, and of equals the one of the lowest loss.

    Args:
        dimension: What was varied.
        trials: That were made, in the order of the dimension's values; at least one.
        min_gain: The least gain that counts, in nats per labelled token.
    """
    if dimension.stops:
        return _choose_rising(dimension, trials, min_gain)
    best = min(trials, key=lambda trial: trial.loss)
    gains = {trial.name: measure_gain(trial.rows, best.rows) for trial in trials if trial is not best}
    near = [trial for trial in trials if trial is best or not gains[trial.name].pays(min_gain)]
    chosen = min(near, key=lambda trial: (trial.parameters, trial.loss))
    others = [show_value(trial.value) for trial in near if trial is not chosen]
    if len(near) == 1:
        why = "It has the lowest loss, and each other is worse by more than noise."
    elif chosen is best:
        why = f"It has the lowest loss; {_join(others)} {'is' if len(others) == 1 else 'are'} within noise of it."
    else:
        why = f"It has the fewest parameters of those within noise of the lowest loss, {show_value(best.value)}'s."
    return chosen, why


def _choose_rising(dimension: Dimension, trials: Sequence[Trial], min_gain: float) -> tuple[Trial, str]:
    if len(trials) < 2:
        return trials[-1], "Nothing was compared with it."
    gain, last = gain_of_last(trials), trials[-1]
    if gain.pays(min_gain):
        return last, f"Each {dimension.title} paid over the one before it: a larger one may pay too."
    name = f"{dimension.title} {show_value(last.value)}".capitalize()
    if gain.high < 0:
        low, high = -gain.high, -gain.low
        return trials[-2], f"{name} lost {-gain.value:.4f} [{low:.4f}, {high:.4f}] nats per token: more than noise."
    found = f"{name} gained {gain.value:.4f} [{gain.low:.4f}, {gain.high:.4f}] nats per token over it"
    return trials[-2], f"{found}: {'no more than noise' if gain.low <= 0 else f'less than --min-gain {min_gain:g}'}."


def _join(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
