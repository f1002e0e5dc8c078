"""Which trials a sweep wants, and which one it chooses. Needs neither Optuna nor torch."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

REMEDY = "Shorten the epoch by trainer.limit_train_batches instead of max_steps, or set trainer.val_check_interval."
PRUNES_AFTER = 5  # trials that have ended, as Optuna's MedianPruner does by default


class Range(NamedTuple):
    """Values to draw from, both ends included: whole numbers if both are."""

    low: float
    high: float


Space = Mapping[str, Range | Sequence[Any]]
"""Each key that a sweep sets, with the values to draw from or to try."""


@dataclass(frozen=True)
class Planned:
    """A trial that a sweep wants."""

    name: str  # of its folder
    settings: Mapping[str, Any] | None  # None: to be drawn, or those of the trial that it repeats
    repeats: str = ""
    seed: int = 0  # added to the sweep's


@dataclass(frozen=True)
class Trial:
    """A training that has ended."""

    folder: str
    settings: Mapping[str, Any]
    parameters: int  # that train
    val_loss: float  # the lowest; infinite if it diverged
    minutes: float
    pruned: bool = False

    def figures(self) -> dict[str, Any]:
        """Return the fields for JSON, which has no infinity."""
        return asdict(self) | {"val_loss": self.val_loss if math.isfinite(self.val_loss) else None}


Plan = Callable[[Mapping[str, Trial]], Sequence[Planned]]
"""Lists the trials that a sweep wants, in their order, from those that have ended, by name."""


def combinations(space: Space) -> Iterator[dict[str, Any]]:
    """Yield each combination of a finite space."""
    values = [range(int(each.low), int(each.high) + 1) if isinstance(each, Range) else each for each in space.values()]
    return (dict(zip(space, each, strict=True)) for each in itertools.product(*values))


def count_combinations(space: Space) -> float:
    """Count the combinations of a space: infinite, if a number of it is not whole."""
    return math.prod(
        (values.high - values.low + 1 if isinstance(values.low, int) else math.inf)
        if isinstance(values, Range)
        else len(values)
        for values in space.values()
    )


def plan_ranks(ranks: Sequence[int], seeds: int) -> Plan:
    """Want each rank while the one before it pays, and the first with other seeds."""
    wanted = [Planned(f"rank-{rank}", {"model.rank": rank}) for rank in ranks]
    first = _with_seeds(wanted[0], seeds)

    def plan(ended: Mapping[str, Trial]) -> list[Planned]:
        n_wanted, noise = 2, measure_noise([ended[each.name] for each in first if each.name in ended])
        if all(each.name in ended for each in first):
            while n_wanted < len(wanted) and all(each.name in ended for each in wanted[:n_wanted]):
                if not _pays(ended[wanted[n_wanted - 2].name], ended[wanted[n_wanted - 1].name], noise):
                    break
                n_wanted += 1
        return [*first, *wanted[1:n_wanted]]

    return plan


def plan_search(space: Space, seeds: int, n_drawn: int) -> Plan:
    """Want so many trials with drawn values, or if 0 each combination; and the first with other seeds."""
    settings = [None] * n_drawn if n_drawn else list(combinations(space))
    first, *others = [Planned(f"trial-{number}", each) for number, each in enumerate(settings)]
    return lambda ended: [*_with_seeds(first, seeds), *others]


def _with_seeds(first: Planned, seeds: int) -> list[Planned]:
    repeats = [Planned(f"{first.name}-seed-{seed}", first.settings, first.name, seed) for seed in range(1, seeds)]
    return [first, *repeats]


def measure_noise(trials: Sequence[Trial]) -> float:
    """Return the largest difference between trainings with other seeds; infinite if one of several diverged."""
    losses = [trial.val_loss for trial in trials]
    if len(losses) < 2:
        return 0.0
    return max(losses) - min(losses) if all(map(math.isfinite, losses)) else math.inf


def _pays(reference: Trial, trial: Trial, noise: float) -> bool:
    """Whether a trial's loss is lower than the reference's by more than the noise; one that diverged is no loss."""
    if not math.isfinite(reference.val_loss):
        return math.isfinite(trial.val_loss)
    return reference.val_loss - trial.val_loss > noise


def choose(trials: Sequence[Trial], noise: float, ranks: bool) -> tuple[Trial, str]:
    """Choose one of at least two trials; return it, and why.

    Among ranks, it is the last that paid over the one before it. Otherwise, it is the one with the fewest parameters
    among those that the best does not beat by more than noise, and among equals the one with the lowest loss. A pruned
    trial was not trained to its end, and is not chosen.
    """
    if ranks:
        prior, last = trials[-2:]
        if _pays(prior, last, noise):
            return last, "Each rank paid over the one before it: a larger one may pay too."
        if not math.isfinite(last.val_loss):
            return prior, f"{describe_settings(last).capitalize()} diverged."
        gain = prior.val_loss - last.val_loss
        seed_gain = f", another seed {noise:.4f}" if noise else ""
        seed_gain = seed_gain if math.isfinite(noise) else ", and another seed alone diverged"
        return prior, f"{describe_settings(last).capitalize()} does not pay: it gains {gain:+.4f}{seed_gain}."
    whole = [trial for trial in trials if math.isfinite(trial.val_loss) and not trial.pruned]
    best = min(whole, key=lambda trial: trial.val_loss)
    candidates = [trial for trial in whole if trial is best or not _pays(trial, best, noise)]
    names = "; ".join(map(describe_settings, candidates))
    reason = f"Within noise of the lowest loss: {names}. It has the fewest parameters, or of equals the lowest loss."
    return min(candidates, key=lambda trial: (trial.parameters, trial.val_loss)), reason


def describe_settings(trial: Trial) -> str:
    """Return the settings of a trial in words, as ``rank 8, learning_rate 0.0001``."""
    return ", ".join(f"{key.rpartition('.')[2]} {format_value(value)}" for key, value in trial.settings.items())


def format_value(value: Any) -> str:
    """Return a value as text, a number with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
