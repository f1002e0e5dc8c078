"""The optimizer, its parameter groups and its learning-rate schedule."""

import inspect
import math
import pydoc
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from qlora_lightning.model.adapters.inject import trainable_tensors
from qlora_lightning.support.errors import UserError, explaining
from qlora_lightning.support.values import check_setting

ParameterGroups = list[dict[str, Any]]
LearningRate = float | Literal["auto"]
_OF_THE_RUN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # arguments of each schedule
_DUMMY_STEPS = 100  # of the run with which a schedule is checked


def check_optimizer(choice: str | dict[str, Any] | None, learning_rate: LearningRate, weight_decay: float) -> None:
    """Reject an optimizer that cannot be built, before minutes of loading."""
    optimizer_class, arguments = choose_optimizer(choice, learning_rate, weight_decay)
    if choice is not None:
        try:
            optimizer_class([nn.Parameter(torch.zeros(1, 1))], **{**arguments, "lr": 1e-4})
        except (TypeError, ValueError) as error:
            raise UserError(
                f"model.optimizer {optimizer_class.__name__} rejects its init_args: {error}", "model.optimizer"
            ) from error


def choose_learning_rate(choice: LearningRate, width: int, preferences: bool = False) -> float:
    """Return the peak learning rate: ``auto`` means ``2e-4 · (4096 / width)^0.78``, by a base's hidden size.

    2e-4 is from Dettmers et al. 2023 (QLoRA) for 7B; the exponent is from a sweep over LLaMA bases (Thinking
    Machines 2025, "LoRA Without Regret"). For 70B this is 1.2e-4, for Llama-3.2-1B 3.4e-4, for SmolLM2-135M 9.2e-4.

    Preferences take a tenth: at the whole rate DPO soon has no loss left, and worse answers than the base.
    """
    return (2e-5 if preferences else 2e-4) * (4096 / width) ** 0.78 if choice == "auto" else choice


def choose_optimizer(
    choice: str | dict[str, Any] | None, learning_rate: LearningRate, weight_decay: float
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class and arguments of an optimizer.

    ``choice`` is a class path, or ``{"class_path": …, "init_args": {…}}`` without ``lr``; ``None`` means torch's AdamW,
    fused.
    """
    if choice is None:
        return AdamW, {"lr": learning_rate, "weight_decay": weight_decay, "fused": True}
    spec: dict[str, Any] = {"class_path": choice} if isinstance(choice, str) else choice
    is_valid = isinstance(spec, dict) and "class_path" in spec and spec.keys() <= {"class_path", "init_args"}
    expected = "the path of a class, such as torch.optim.SGD, as text, or class_path and, if needed, init_args; no more"
    check_setting("model.optimizer", choice, is_valid, expected)
    path, arguments = spec["class_path"], dict(spec.get("init_args") or {})
    for name, key in (("lr", "model.learning_rate"), ("weight_decay", "model.weight_decay")):
        check_setting(f"model.optimizer.init_args.{name}", arguments.get(name), name not in arguments, f"it as {key}")
    optimizer_class: Any = pydoc.locate(str(path))
    is_valid = inspect.isclass(optimizer_class) and issubclass(optimizer_class, Optimizer)
    check_setting("model.optimizer.class_path", path, is_valid, "a class of torch optimizers that can be imported")
    arguments["lr"] = learning_rate
    parameters = inspect.signature(optimizer_class).parameters.values()
    if any(each.name == "weight_decay" or each.kind is each.VAR_KEYWORD for each in parameters):
        arguments["weight_decay"] = weight_decay
    else:
        check_setting("model.weight_decay", weight_decay, not weight_decay, f"0, since {path} has none")
    return optimizer_class, arguments


def group_parameters(
    model: nn.Module, learning_rate: float, weight_decay: float, ratio: float | None
) -> ParameterGroups:
    """Put all trainable parameters into one group or, with a ratio, into the groups of PEFT's LoRA+.

    Hayou et al. 2024 (LoRA+): with the same rate A and B of wide layers do not both learn efficiently. B, and tensors
    of one dimension, take ``ratio`` times the learning rate of A; biases have no weight decay.
    """
    if ratio is None:
        return [{"params": list(trainable_tensors(model).values())}]
    from peft.optimizers import create_loraplus_optimizer

    # PEFT returns the groups only inside an optimizer, of any class.
    sgd = create_loraplus_optimizer(
        model,
        SGD,
        lr=learning_rate,
        loraplus_lr_ratio=ratio,
        loraplus_lr_embedding=learning_rate,  # PEFT has 1e-6 for adapters of embeddings
        loraplus_weight_decay=weight_decay,
    )
    names = ("params", "lr", "weight_decay")
    return [{name: group[name] for name in names} for group in sgd.param_groups if group["params"]]


def check_schedule(choice: str | dict[str, Any], learning_rate: LearningRate, warmup: int | float) -> None:
    """Reject a schedule that cannot be built and stepped to its end, before minutes of loading."""
    rate = 1.0 if learning_rate == "auto" else learning_rate  # some have a rate to end with, which is lower
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = build_schedule(optimizer, choice, _DUMMY_STEPS, min(warmup, _DUMMY_STEPS // 2))
    for _ in range(_DUMMY_STEPS):
        optimizer.step()
        with explaining(f"model.schedule {choice!r} cannot be computed", "model.schedule"):
            schedule.step()
        rate = float(optimizer.param_groups[0]["lr"])
        is_valid = -1e-9 < rate < math.inf  # rounding
        check_setting("model.schedule", choice, is_valid, f"rates of 0 or more, and one of its rates is {rate}")


def _parse_schedule(choice: str | dict[str, Any], warmup: int | float) -> tuple[str, dict[str, Any]]:
    """Return the name and arguments of a schedule; see :func:`build_schedule`."""
    arguments: dict[str, Any] = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = arguments.pop("name", None)
    needs_metrics = {"reduce_lr_on_plateau", "greedy"}  # not stepped once per optimizer step
    names = sorted({schedule.value for schedule in SchedulerType} - needs_metrics)
    check_setting("model.schedule", choice, name in names, f"a name among {', '.join(names)}")
    if name == "constant" and warmup:  # the only one without warmup
        name = "constant_with_warmup"
    for argument in arguments:
        if argument in _OF_THE_RUN:
            raise UserError(
                f"model.schedule has the argument {argument!r}, which the run sets: the warmup by model.warmup, "
                "the length by trainer.max_epochs or trainer.max_steps. Leave it out.",
                "model.schedule",
            )
        if argument not in _arguments_of(name):  # transformers ignores some
            expected = f"expected {', '.join(_arguments_of(name)) or 'none'}"
            raise UserError(
                f"model.schedule has the argument {argument!r}, which {name} lacks: {expected}.", "model.schedule"
            )
    return name, arguments


def ends_low(schedule: str | dict[str, Any]) -> bool:
    """Whether a schedule lowers the learning rate towards the planned end of a run."""
    name = schedule if isinstance(schedule, str) else schedule["name"]
    return name not in ("constant", "constant_with_warmup", "inverse_sqrt")


def needs_end(schedule: str | dict[str, Any], warmup: int | float) -> bool:
    """Whether the rates of a schedule depend on the number of steps of the run."""
    return ends_low(schedule) or (isinstance(warmup, float) and warmup > 0)


def _arguments_of(schedule: str) -> list[str]:
    """Return the arguments of a schedule, without those that the run sets."""
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(schedule)]).parameters
    return [name for name in parameters if name not in _OF_THE_RUN]


def check_warmup(warmup: int | float, total_steps: int) -> None:
    """Reject a warmup that is longer than the run: the learning rate would never reach its peak."""
    expected = f"at most {total_steps:,}, the steps of the run, or a share of them such as 0.03"
    check_setting("model.warmup", warmup, warmup <= total_steps, expected)


def build_schedule(
    optimizer: Optimizer, choice: str | dict[str, Any], total_steps: int | None, warmup: int | float
) -> LRScheduler:
    """Build one of transformers' schedules, to be stepped once per optimizer step; see :func:`needs_end`.

    ``choice`` is a name, or ``{"name": …, …}`` with the schedule's own arguments, such as ``min_lr_rate``. Over
    ``warmup`` steps, or such a share of the steps, rounded up, the rate rises from 0; there is no warmup of less than
    one step, in which nothing would move.

    Raises:
        UserError: The schedule cannot be built, or its warmup is longer than the run.
    """
    name, arguments = _parse_schedule(choice, warmup)
    if total_steps is not None:
        check_warmup(warmup, total_steps)
    steps = warmup if isinstance(warmup, int) else warmup * (total_steps or 0)
    accepted = ", ".join(_arguments_of(name)) or "no arguments"
    with explaining(f"model.schedule {choice!r} cannot be built: {name} takes {accepted}", "model.schedule"):
        schedule: LRScheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=math.ceil(steps) if steps >= 1 else 0,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=arguments,
        )
    return schedule
