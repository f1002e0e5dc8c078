"""What Lightning's connectors put on a Trainer, and its class does not declare."""

from typing import Any

from lightning import Callback, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks, in the order in which they are called."""
    connected: Any = trainer
    callbacks: list[Callback] = connected.callbacks
    return callbacks


def is_trial_run(trainer: Trainer) -> bool:
    """Whether ``fast_dev_run`` was asked for: a few batches that leave nothing behind."""
    connected: Any = trainer
    return bool(connected.fast_dev_run)


def log_interval(trainer: Trainer) -> int:
    """Return the optimizer steps between two lines of the loggers."""
    connected: Any = trainer
    return int(connected.log_every_n_steps)
