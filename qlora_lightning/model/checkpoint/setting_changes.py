"""On a resume, the command line beats the config, which beats the checkpoint: reports what differs, and sees to it."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping
from torch.optim.lr_scheduler import LambdaLR

from qlora_lightning.support.trainer import callbacks_of

Change = tuple[str, Any, Any]
"""A setting's name, its value in the checkpoint, and its value now."""

_OF_TRAINER = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")


def trainer_settings(trainer: Any) -> dict[str, Any]:
    """Return those of the Trainer's settings that training depends on, as plain values."""
    return {name: _plain(getattr(trainer, name, None)) for name in _OF_TRAINER}


def find_changes(stored: Mapping[str, Any], own: Mapping[str, Any], prefix: str, owner: object = None) -> list[Change]:
    """List the settings that differ; one that the checkpoint of an older version lacks had the owner's default."""
    before = {**_defaults(owner), **stored} if stored else {}
    return [
        (f"{prefix}.{name}", before[name], own[name])
        for name in sorted(before.keys() & own.keys())
        if before[name] != own[name]
    ]


def _defaults(owner: object) -> dict[str, Any]:
    """Return the default arguments of an object's class, with those of its base classes."""
    found: dict[str, Any] = {}
    for cls in reversed(type(owner).__mro__):
        if "__init__" in vars(cls):
            parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
            found |= {each.name: each.default for each in parameters if each.default is not each.empty}
    return found


def describe_changes(changes: Sequence[Change], whose: str = "the checkpoint's") -> str:
    """Describe changes, a line for each, under what they differ from."""
    return "\n".join([f"Settings that differ from {whose} (there → now):", *(f"  {show_change(c)}" for c in changes)])


def show_change(change: Change) -> str:
    """Show a setting with both of its values, there and now."""
    name, before, now = change
    return f"{name}: {_short(before)} → {_short(now)}"


# ---- early stopping --------------------------------------------------------------------------------------------------


def keep_patience(trainer: Any, states: Mapping[str, dict[str, Any]]) -> list[Change]:
    """Let the configured patience of EarlyStopping rule, in the states that callbacks are restored from."""
    changes: list[Change] = []
    for stopping in callbacks_of(trainer):
        if not isinstance(stopping, EarlyStopping):
            continue
        state = states.get(stopping.state_key, {})
        if state.get("patience", stopping.patience) != stopping.patience:
            changes.append((f"EarlyStopping({stopping.monitor}).patience", state["patience"], stopping.patience))
            state["patience"] = stopping.patience
    return changes


# ---- optimizers ------------------------------------------------------------------------------------------------------


def describe_optimizers(trainer: Any) -> list[dict[str, Any]]:
    """Return each optimizer's ``class`` and the options of its ``groups``, as they are configured, as plain values."""
    return [
        {
            "class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "groups": [
                {name: _plain(value) for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
                for group in optimizer.param_groups
            ],
        }
        for optimizer in trainer.optimizers
    ]


def keep_configured(trainer: Any, checkpoint: Mapping[str, Any], stored: Sequence[Mapping[str, Any]]) -> list[str]:
    """Let configured options of optimizers beat those in the states that they are restored from.

    torch restores learning rate and weight decay together with the moments: a new ``model.learning_rate`` would change
    nothing. Options that are configured as they were stay the checkpoint's: a schedule may have changed them, as
    OneCycleLR does betas.

    Args:
        trainer: Its optimizers are about to be restored.
        checkpoint: They are restored from it; changed in place.
        stored: What :func:`describe_optimizers` returned in the run that saved it.

    Returns:
        A line for each optimizer of another class, which begins with a fresh state: the old one means nothing to it.
    """
    lines, states = [], checkpoint["optimizer_states"]
    options = stored, describe_optimizers(trainer)
    for optimizer, state, before, now in zip(trainer.optimizers, states, *options, strict=False):
        groups, own = state["param_groups"], optimizer.state_dict()
        if before["class"] != now["class"]:
            for group, old in zip(own["param_groups"], groups, strict=False):
                group["lr"] = old["lr"]  # the schedule's, which continues
            state.update(own)
            lines.append(
                f"The optimizer was {before['class']} and is {now['class']}: it begins with a fresh state, while the "
                "learning rate's schedule continues."
            )
            continue
        pairs = zip(groups, own["param_groups"], before["groups"], now["groups"], strict=False)  # torch compares sizes
        for group, fresh, old, new in pairs:
            group.update({name: fresh[name] for name, value in new.items() if old.get(name) != value})
    for config, of_schedule in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=False):
        schedule = config.scheduler
        if isinstance(schedule, LambdaLR):  # its rates follow from the step alone, as those of transformers do
            groups = states[trainer.optimizers.index(schedule.optimizer)]["param_groups"]
            for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=False):
                group.update(initial_lr=base, lr=base * factor(of_schedule["last_epoch"]))
            of_schedule.update(base_lrs=schedule.base_lrs, _last_lr=[group["lr"] for group in groups])
    return lines


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
