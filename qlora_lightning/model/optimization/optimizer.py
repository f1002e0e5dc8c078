"""Builds the optimizer, torch's AdamW or any other by its class path."""

import importlib
import inspect
from typing import Any

from torch.optim import AdamW, Optimizer

from qlora_lightning.errors import UserError

ParameterGroups = list[dict[str, Any]]


def build_optimizer(
    groups: ParameterGroups, choice: str | dict[str, Any] | None, learning_rate: float, weight_decay: float, fused: bool
) -> Optimizer:
    """Build the optimizer over ``groups``.

    Args:
        groups: Parameter groups as torch's optimizers take them; a group's own ``lr`` stays.
        choice: A class path, or ``{"class_path": …, "init_args": {…}}`` without ``lr``; ``None`` means torch's AdamW.
        learning_rate: Of every group that has none of its own.
        weight_decay: Likewise.
        fused: Whether AdamW may run as one kernel.

    Raises:
        UserError: The class is not there or does not take the arguments, or the learning rate is not positive.
    """
    optimizer_class, arguments = check_optimizer(choice, learning_rate, weight_decay)
    if choice is None:
        arguments["fused"] = fused
    try:
        return optimizer_class(groups, **arguments)
    except (TypeError, ValueError) as error:
        name = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
        raise UserError(f"model.optimizer {name} does not take {arguments}: {error}.") from error


def check_optimizer(
    choice: str | dict[str, Any] | None, learning_rate: float, weight_decay: float
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return class and arguments of an optimizer; see :func:`build_optimizer`.

    Raises:
        UserError: The class is not there, an argument has a key of its own, or the learning rate is not positive.
    """
    if learning_rate <= 0:
        raise UserError(f"model.learning_rate is {learning_rate}: expected a positive number, such as 2e-4.")
    if choice is None:
        return AdamW, {"lr": learning_rate, "weight_decay": weight_decay}
    if isinstance(choice, str):
        choice = {"class_path": choice}
    foreign = choice.keys() - {"class_path", "init_args"}
    if foreign or "class_path" not in choice:
        raise UserError(f"model.optimizer is {choice}: expected a class_path and, if needed, init_args; nothing else.")
    arguments = dict(choice.get("init_args") or {})
    for name, key in (("lr", "model.learning_rate"), ("weight_decay", "model.weight_decay")):
        if name in arguments:
            raise UserError(f"model.optimizer.init_args sets {name}, which has a key of its own: set {key}.")
    optimizer_class = _import_class(choice["class_path"])
    arguments["lr"] = learning_rate
    if "weight_decay" in inspect.signature(optimizer_class).parameters:
        arguments["weight_decay"] = weight_decay
    elif weight_decay:
        raise UserError(f"model.weight_decay is {weight_decay}, but {choice['class_path']} has none: set it to 0.")
    return optimizer_class, arguments


def _import_class(path: str) -> type[Optimizer]:
    module_name, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"model.optimizer.class_path {path!r} cannot be imported: {error}.") from error
    if not (inspect.isclass(found) and issubclass(found, Optimizer)):
        raise UserError(f"model.optimizer.class_path {path!r} is not a torch optimizer class, but {found!r}.")
    return found
