"""On a resume, the command line beats the config, which beats the checkpoint: says what differs, and sees to it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.optim.lr_scheduler import LambdaLR

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import callbacks_of

Change = tuple[str, Any, Any]
"""A setting's name, its value in the checkpoint, and its value now."""
Configured = dict[str, Any]
"""``class`` of an optimizer, and ``groups``: the options of each of its parameter groups."""

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


def describe_changes(changes: Sequence[Change], whose: str = "the checkpoint's") -> str:
    """Word changes, a line for each, under what they differ from."""
    lines = [f"  {show_change(change)}" for change in changes]
    return "\n".join([f"Settings that differ from {whose} (there → now):", *lines])


def show_change(change: Change) -> str:
    """Show a setting with both of its values, there and now."""
    name, before, now = change
    return f"{name}: {_short(before)} → {_short(now)}"


def keep_patience(trainer: Any, states: Mapping[str, dict[str, Any]]) -> list[Change]:
    """Let the configured patience of Lightning's EarlyStopping rule: it would restore the checkpoint's.

    Args:
        trainer: Whose callbacks are about to be restored.
        states: What they are restored from, by their keys; changed in place.

    Returns:
        Each patience that differs.
    """
    changes: list[Change] = []
    for stopping in (each for each in callbacks_of(trainer) if isinstance(each, EarlyStopping)):
        state = states.get(stopping.state_key)
        if state is not None and state["patience"] != stopping.patience:
            changes.append((f"EarlyStopping({stopping.monitor}).patience", state["patience"], stopping.patience))
            state["patience"] = stopping.patience
    return changes


def forget_scores(trainer: Any) -> None:
    """Reset Lightning's EarlyStopping: it would compare losses on different validation samples."""
    for stopping in (each for each in callbacks_of(trainer) if isinstance(each, EarlyStopping)):
        if stopping.monitor.startswith("val_"):
            stopping.best_score = torch.tensor(float("inf" if stopping.mode == "min" else "-inf"))
            stopping.wait_count = 0


class FreshOptimizers:
    """What the optimizers were configured with, to be put back over what a checkpoint restores.

    torch restores a learning rate and a weight decay together with the moments. Without this, a new
    ``model.learning_rate`` would change nothing on a resume.

    Args:
        trainer: After its optimizers are configured, and before they are restored.
    """

    def __init__(self, trainer: Any) -> None:
        self._classes = [_class_name(optimizer) for optimizer in trainer.optimizers]
        self._options = [[_options(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        self._rates = [list(schedule.base_lrs) for schedule in _lambda_schedules(trainer)]

    def state_dict(self) -> list[Configured]:
        """Give each optimizer's class, and the options of its groups, as plain values."""
        return [
            {"class": name, "groups": [{key: _plain(value) for key, value in options.items()} for options in groups]}
            for name, groups in zip(self._classes, self._options, strict=True)
        ]

    def replace_foreign_states(
        self, trainer: Any, states: list[dict[str, Any]], stored: Sequence[Configured]
    ) -> list[str]:
        """Let an optimizer of another class than the checkpoint's begin anew: the old state means nothing to it.

        Args:
            trainer: Whose optimizers are about to be restored.
            states: What they are restored from; changed in place.
            stored: What :meth:`state_dict` gave when the checkpoint was made; nothing in an older one.

        Returns:
            A line for each.
        """
        lines = []
        for number, (before, name) in enumerate(zip(stored, self._classes, strict=False)):
            if before["class"] != name:
                fresh = trainer.optimizers[number].state_dict()
                for group, old in zip(fresh["param_groups"], states[number]["param_groups"], strict=False):
                    group["lr"] = old["lr"]  # the schedule's, which goes on
                states[number] = fresh
                lines.append(
                    f"The optimizer was {before['class']} and is {name}: it begins with a fresh state, while the "
                    "learning rate's schedule goes on."
                )
        return lines

    @staticmethod
    def check_groups(trainer: Any, states: Sequence[Mapping[str, Any]]) -> None:
        """Refuse states of other parameter groups: torch would, in words of its own.

        Args:
            trainer: Whose optimizers are about to be restored.
            states: What they are restored from.

        Raises:
            UserError: The groups hold other numbers of tensors.
        """
        for optimizer, state in zip(trainer.optimizers, states, strict=False):
            before, now = (
                [len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)
            )
            if before != now:
                raise UserError(
                    f"The optimizer's parameter groups held {_join(before)} tensors in the checkpoint and hold "
                    f"{_join(now)}: model.loraplus_ratio is switched on or off, or parameter_groups() is another. Put "
                    "it back, or begin a new run from the adapter folder with model.adapter."
                )

    def put_back(self, trainer: Any, stored: Sequence[Configured]) -> None:
        """Let the options that are configured otherwise than they were rule again.

        The others stay as restored: a schedule may have changed them since, as OneCycleLR does betas.

        Args:
            trainer: After its optimizers are restored.
            stored: What :meth:`state_dict` gave when the checkpoint was made; from an older one, that holds nothing,
                all options count as changed.
        """
        for number, (optimizer, groups) in enumerate(zip(trainer.optimizers, self._options, strict=True)):
            before = stored[number]["groups"] if number < len(stored) else []
            for place, (group, options) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
                known = before[place] if place < len(before) else {}
                same = {name for name, value in options.items() if name in known and known[name] == _plain(value)}
                group.update({name: value for name, value in options.items() if name not in same})
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


def _class_name(optimizer: Any) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _join(counts: Sequence[int]) -> str:
    return " + ".join(map(str, counts))


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
