"""On a resume, the command line beats the config, which beats the checkpoint: reports what differs, and sees to it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from qlora_lightning.support.errors import UserError

Change = tuple[str, Any, Any]
"""A setting's name, its value in the checkpoint, and its value now."""

_OF_TRAINER = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")
OF_VALIDATIONS = ("limit_val_batches", "val_check_interval", "check_val_every_n_epoch")


def trainer_settings(trainer: Any) -> dict[str, Any]:
    """Return those of the Trainer's settings that training depends on, as plain values."""
    values = {name: getattr(trainer, name, None) for name in (*_OF_TRAINER, *OF_VALIDATIONS)}
    return {name: value if isinstance(value, int | float | None) else str(value) for name, value in values.items()}


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


def optimizer_classes(trainer: Any) -> list[str]:
    """Return the names of the optimizers' classes."""
    return [f"{type(each).__module__}.{type(each).__qualname__}" for each in trainer.optimizers]


def keep_configured(trainer: Any, checkpoint: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Let the configured options of optimizers beat those in the states that they are restored from.

    torch restores learning rate and weight decay together with the moments: a new ``model.learning_rate`` would change
    nothing. The rates of a schedule other than transformers' stay the checkpoint's.

    Args:
        trainer: Its optimizers are about to be restored.
        checkpoint: They are restored from it; changed in place.
        classes: What :func:`optimizer_classes` returned in the run that saved it.

    Raises:
        UserError: An optimizer is of another class: the state means nothing to it.
    """
    for before, now in zip(classes, optimizer_classes(trainer), strict=False):
        if before != now:
            raise UserError(
                f"The optimizer was {before} and is {now}, which cannot continue from that state: put model.optimizer "
                "back, or begin a new run from the adapter folder with model.adapter."
            )
    states = checkpoint["optimizer_states"]
    for optimizer, state in zip(trainer.optimizers, states, strict=False):  # torch compares the numbers of groups
        for group, fresh in zip(state["param_groups"], optimizer.param_groups, strict=False):
            group.update({name: fresh[name] for name in fresh if name not in ("params", "lr", "initial_lr")})
    for config, state in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=False):
        schedule = config.scheduler
        if isinstance(schedule, LambdaLR):  # its rates follow from the step alone, as those of transformers do
            groups = states[trainer.optimizers.index(schedule.optimizer)]["param_groups"]
            for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=False):
                group.update(initial_lr=base, lr=base * factor(state["last_epoch"]))
            state["base_lrs"] = schedule.base_lrs
