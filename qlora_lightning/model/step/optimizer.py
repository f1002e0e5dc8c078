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
from qlora_lightning.support.errors import UserError, check_setting

ParameterGroups = list[dict[str, Any]]
LearningRate = float | Literal["auto"]


def check_optimization(
    choice: str | dict[str, Any] | None, learning_rate: LearningRate, weight_decay: float, loraplus_ratio: float | None
) -> None:
    """Reject settings of the optimizer, before minutes of loading."""
    optimizer_class, arguments = choose_optimizer(choice, learning_rate, weight_decay)
    if choice is not None:
        try:
            optimizer_class([nn.Parameter(torch.zeros(1, 1))], **{**arguments, "lr": 1e-4})
        except (TypeError, ValueError) as error:
            raise UserError(
                f"model.optimizer {optimizer_class.__name__} rejects its init_args: {error}", "model.optimizer"
            ) from error
    if loraplus_ratio is not None:
        is_valid = 1 <= loraplus_ratio < math.inf
        check_setting("model.loraplus_ratio", loraplus_ratio, is_valid, "1 or more, such as 16, or null")


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
    is_valid = learning_rate == "auto" or 0 < learning_rate < math.inf
    check_setting("model.learning_rate", learning_rate, is_valid, "a positive number, such as 2e-4, or auto")
    check_setting("model.weight_decay", weight_decay, 0 <= weight_decay < math.inf, "0 or more")
    if choice is None:
        return AdamW, {"lr": learning_rate, "weight_decay": weight_decay, "fused": True}
    spec: dict[str, Any] = {"class_path": choice} if isinstance(choice, str) else choice
    is_valid = "class_path" in spec and spec.keys() <= {"class_path", "init_args"}
    check_setting("model.optimizer", choice, is_valid, "a class_path and, if needed, init_args; nothing else")
    path, arguments = spec["class_path"], dict(spec.get("init_args") or {})
    for name, key in (("lr", "model.learning_rate"), ("weight_decay", "model.weight_decay")):
        check_setting(f"model.optimizer.init_args.{name}", arguments.get(name), name not in arguments, f"it as {key}")
    optimizer_class: Any = pydoc.locate(str(path))
    is_valid = inspect.isclass(optimizer_class) and issubclass(optimizer_class, Optimizer)
    check_setting("model.optimizer.class_path", path, is_valid, "a class of torch optimizers that can be imported")
    arguments["lr"] = learning_rate
    if "weight_decay" in inspect.signature(optimizer_class).parameters:
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


def check_schedule(choice: str | dict[str, Any], warmup_ratio: float) -> tuple[str, dict[str, Any]]:
    """Return the name and arguments of a schedule; see :func:`build_schedule`."""
    check_setting("model.warmup_ratio", warmup_ratio, 0.0 <= warmup_ratio < 1.0, "a share of the steps in [0, 1)")
    arguments: dict[str, Any] = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = arguments.pop("name", None)
    needs_metrics = {"reduce_lr_on_plateau", "greedy"}  # not stepped once per optimizer step
    names = sorted({schedule.value for schedule in SchedulerType} - needs_metrics)
    check_setting("model.schedule", choice, name in names, f"a name among {', '.join(names)}")
    if name == "constant" and warmup_ratio:  # the only one without warmup
        name = "constant_with_warmup"
    accepted = [*inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters]
    for argument in arguments:
        if argument not in accepted:  # transformers ignores some, and rejects others only after the base is loaded
            expected = f"expected {', '.join(accepted[1:])}"
            raise UserError(
                f"model.schedule has the argument {argument!r}, which {name} lacks: {expected}.", "model.schedule"
            )
    return name, arguments


def build_schedule(
    optimizer: Optimizer, choice: str | dict[str, Any], total_steps: int | None, warmup_ratio: float
) -> LRScheduler:
    """Build one of transformers' schedules, to be stepped once per optimizer step.

    ``choice`` is a name, or ``{"name": …, …}`` with the schedule's own arguments, such as ``min_lr_rate``. Over a share
    ``warmup_ratio`` of the steps, rounded up, the rate rises from 0; there is no warmup of less than one step, in which
    nothing would move.
    """
    if not total_steps:
        raise UserError(
            "The run has no end, or takes no step: set trainer.max_epochs or trainer.max_steps, and neither them nor "
            "trainer.limit_train_batches to 0.",
            "trainer.max_steps",
        )
    name, arguments = check_schedule(choice, warmup_ratio)
    warmup = warmup_ratio * total_steps
    schedule: LRScheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=math.ceil(warmup) if warmup >= 1 else 0,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=arguments,
    )
    return schedule
