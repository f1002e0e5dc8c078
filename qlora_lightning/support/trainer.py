"""What Lightning's connectors put on a Trainer, and its class does not declare."""

from typing import Any, cast

from lightning import Callback, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks, in the order in which they are called."""
    return cast(list[Callback], cast(Any, trainer).callbacks)


def is_trial_run(trainer: Trainer) -> bool:
    """Whether ``fast_dev_run`` was asked for: a few batches that leave nothing behind."""
    return bool(cast(Any, trainer).fast_dev_run)


def log_interval(trainer: Trainer) -> int:
    """Return the optimizer steps between two lines of the loggers."""
    return int(cast(Any, trainer).log_every_n_steps)
