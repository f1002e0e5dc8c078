"""On a resume, the command line beats the config, which beats the checkpoint: reports what differs, and sees to it."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping
from torch.optim.lr_scheduler import LambdaLR

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import callbacks_of

Change = tuple[str, Any, Any]
"""A setting's name, its value in the checkpoint, and its value now."""

_OF_TRAINER = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")


def trainer_settings(trainer: Any) -> dict[str, Any]:
    """Return those of the Trainer's settings that training depends on, as plain values."""
    return {name: _plain(getattr(trainer, name, None)) for name in _OF_TRAINER}


def find_changes(stored: Mapping[str, Any], own: Mapping[str, Any], prefix: str) -> list[Change]:
    """List the settings that differ, of those that both sides know."""
    names = sorted(stored.keys() & own.keys())
    return [(f"{prefix}.{name}", stored[name], own[name]) for name in names if stored[name] != own[name]]


def describe_changes(changes: Sequence[Change], whose: str = "the checkpoint's") -> str:
    """Describe changes, a line for each, under what they differ from."""
    return "\n".join([f"Settings that differ from {whose} (there → now):", *(f"  {show_change(c)}" for c in changes)])


def show_change(change: Change) -> str:
    """Show a setting with both of its values, there and now."""
    name, *values = change
    texts = ["null" if value is None else str(value) for value in values]
    return f"{name}: " + " → ".join(text if len(text) <= 60 else f"{text[:57]}…" for text in texts)


def keep_patience(trainer: Any, states: Mapping[str, dict[str, Any]]) -> list[Change]:
    """Let the configured patience of EarlyStopping rule, in the states that callbacks are restored from."""
    changes: list[Change] = []
    for stopping in callbacks_of(trainer):
        if isinstance(stopping, EarlyStopping) and stopping.state_key in states:
            state = states[stopping.state_key]
            if state["patience"] != stopping.patience:
                changes.append((f"EarlyStopping({stopping.monitor}).patience", state["patience"], stopping.patience))
                state["patience"] = stopping.patience
    return changes


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


def keep_configured(trainer: Any, checkpoint: Mapping[str, Any], stored: Sequence[Mapping[str, Any]]) -> None:
    """Let configured options of optimizers beat those in the states that they are restored from.

    torch restores learning rate and weight decay together with the moments: a new ``model.learning_rate`` would change
    nothing. Options that are configured as they were stay the checkpoint's: a schedule may have changed them, as
    OneCycleLR does betas.

    Args:
        trainer: Its optimizers are about to be restored.
        checkpoint: They are restored from it; changed in place.
        stored: What :func:`describe_optimizers` returned in the run that saved it.

    Raises:
        UserError: An optimizer is of another class: the state means nothing to it.
    """
    states, configured = checkpoint["optimizer_states"], describe_optimizers(trainer)
    for optimizer, state, before, now in zip(trainer.optimizers, states, stored, configured, strict=False):
        if before["class"] != now["class"]:
            raise UserError(
                f"The optimizer was {before['class']} and is {now['class']}, which cannot continue from that state: "
                "put model.optimizer back, or begin a new run from the adapter folder with model.adapter."
            )
        groups = zip(state["param_groups"], optimizer.param_groups, before["groups"], now["groups"], strict=False)
        for group, fresh, old, new in groups:  # torch compares their numbers
            group.update({name: fresh[name] for name, value in new.items() if old.get(name) != value})
    for config, of_schedule in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=False):
        schedule = config.scheduler
        if isinstance(schedule, LambdaLR):  # its rates follow from the step alone, as those of transformers do
            groups = states[trainer.optimizers.index(schedule.optimizer)]["param_groups"]
            for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=False):
                group.update(initial_lr=base, lr=base * factor(of_schedule["last_epoch"]))
            of_schedule["base_lrs"] = schedule.base_lrs


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
