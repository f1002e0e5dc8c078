"""On a resume, the command line beats the config, which beats the checkpoint: says what differs, and sees to it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

Change = tuple[str, Any, Any]
"""A setting's name, its value in the checkpoint, and its value now."""

_OF_TRAINER = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")


def trainer_settings(trainer: Any) -> dict[str, Any]:
    """Give those of the Trainer's settings that training depends on, as plain values."""
    return {name: _plain(getattr(trainer, name, None)) for name in _OF_TRAINER}


def find_changes(stored: Mapping[str, Any], own: Mapping[str, Any], prefix: str) -> list[Change]:
    """List the settings that both sides know and that differ."""
    return [
        (f"{prefix}.{name}", stored[name], own[name])
        for name in sorted(stored.keys() & own.keys())
        if stored[name] != own[name]
    ]


def describe_changes(changes: Sequence[Change]) -> str:
    """Word changes, a line for each."""
    lines = [f"  {name}: {_short(before)} → {_short(now)}" for name, before, now in changes]
    return "\n".join(["Settings that differ from the checkpoint's (there → now):", *lines])


class FreshOptimizers:
    """What the optimizers were configured with, to be put back over what a checkpoint restores.

    torch restores a learning rate and a weight decay together with the moments. Without this, a new
    ``model.learning_rate`` would change nothing on a resume.

    Args:
        trainer: After its optimizers are configured, and before they are restored.
    """

    def __init__(self, trainer: Any) -> None:
        self._options = [[_options(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        self._rates = [list(schedule.base_lrs) for schedule in _lambda_schedules(trainer)]

    def put_back(self, trainer: Any) -> None:
        """Let what was configured rule again; where it equals what was restored, that changes no bit."""
        for optimizer, groups in zip(trainer.optimizers, self._options, strict=True):
            for group, options in zip(optimizer.param_groups, groups, strict=True):
                group.update(options)
        for schedule, rates in zip(_lambda_schedules(trainer), self._rates, strict=True):
            schedule.base_lrs = rates
            schedule._last_lr = [
                rate * shape(schedule.last_epoch) for rate, shape in zip(rates, schedule.lr_lambdas, strict=True)
            ]
            for group, first, rate in zip(schedule.optimizer.param_groups, rates, schedule._last_lr, strict=True):
                group["initial_lr"], group["lr"] = first, rate


def _lambda_schedules(trainer: Any) -> list[LambdaLR]:
    """The schedules whose rates follow from the step alone; those of transformers are such."""
    schedules = [entry.scheduler for entry in trainer.lr_scheduler_configs]
    return [schedule for schedule in schedules if isinstance(schedule, LambdaLR)]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group; its learning rate is its schedule's matter."""
    return {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
