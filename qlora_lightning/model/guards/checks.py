"""Checks of the first step, of the first after each validation, and now and then: does what should train train?"""

import math
from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from qlora_lightning.errors import UserError

_GROWN = 1.0  # A begins below it, B at zero, and sound training leaves both far below


def check_training_mode(model: nn.Module) -> None:
    """Refuse a model left in evaluation mode: no dropout, and no activation checkpointing without a word.

    Hugging Face models come in ``eval()``, generation leaves them there, and Lightning keeps what it finds.

    Raises:
        RuntimeError: The model is not in training mode.
    """
    asleep = [name for name, module in model.named_modules() if not module.training]
    if asleep:
        raise RuntimeError(
            f"The model is in evaluation mode in a training step ({len(asleep)} modules, as {asleep[0] or 'all'}): "
            "dropout and activation checkpointing would be off. "
            "A callback or hook called `model.eval()` or `generate`; call `model.train()` after it."
        )


def check_callbacks(callbacks: Iterable[object], *needed: type) -> None:
    """Refuse to train without the callbacks that the module itself brings along, and with averages of the whole model.

    Raises:
        RuntimeError: A subclass overrides ``configure_callbacks`` and leaves it out.
        UserError: A callback of Lightning averages weights: its copy is made before there is a model, and does nothing,
            or holds the packed bytes of the base.
    """
    present = list(callbacks)
    averages = [each for each in present if isinstance(each, StochasticWeightAveraging | WeightAveraging)]
    if averages:
        raise UserError(
            f"{type(averages[0]).__name__} averages the weights of a whole model, which here are the packed bytes of a "
            "frozen base. Average the adapter instead: `ema: {decay: 0.999}` in the config, AdapterEMA() in Python."
        )
    missing = [kind for kind in needed if not any(isinstance(callback, kind) for callback in present)]
    if missing:
        raise RuntimeError(
            f"{missing[0].__name__} is missing, and runs would not resume, or not be watched over: return "
            "`[*super().configure_callbacks(), …]` from `configure_callbacks`."
        )


def check_gradients(trainable: Mapping[str, nn.Parameter]) -> bool:
    """Refuse adapters that get no gradient.

    B has one from the first step. A's is exactly zero until B has moved away from zero, so A is asked only then.

    Args:
        trainable: The tensors that train, by name, after backward.

    Returns:
        Whether all could be asked: not yet while an A waits for its B.

    Raises:
        RuntimeError: A tensor has no gradient, or one of zeros only.
    """
    dead, waiting = find_dead_gradients(trainable)
    if dead:
        raise RuntimeError(
            f"{len(dead)} of {len(trainable)} trainable tensors get no gradient, as {', '.join(dead[:3])}: they would "
            "never learn. A frozen layer passes no gradient, or compute_loss does not use them."
        )
    return not waiting


def find_divergence(trainable: Mapping[str, nn.Parameter], step: int, learning_rate: float) -> UserError | None:
    """Find adapters that have grown beyond use: their gradients vanish, or their steps are too small for their size.

    Args:
        trainable: The tensors that train, by name.
        step: Optimizer step, from 0.
        learning_rate: Of that step.

    Returns:
        The error to raise for it; ``None`` where they are of a usual size.
    """
    sizes = {name: tensor.detach().abs().max() for name, tensor in trainable.items() if ".lora_" in name}
    if not sizes:
        return None
    values = dict(zip(sizes, torch.stack(list(sizes.values())).tolist(), strict=True))
    name = max(values, key=lambda each: values[each] if math.isfinite(values[each]) else math.inf)
    if values[name] <= _GROWN:  # False of a NaN
        return None
    return UserError(
        f"Training has diverged by step {step}, at learning rate {learning_rate:.3g}: adapters hold weights up to "
        f"{values[name]:.3g} ({name}; usual are less than 0.1), and no longer learn. Lower model.learning_rate, let it "
        "rise by model.warmup_ratio, and start again, or go on from a checkpoint before it."
    )


def find_dead_gradients(trainable: Mapping[str, nn.Parameter]) -> tuple[list[str], list[str]]:
    """Name the tensors that have no gradient, and the A's that may have one of zeros, since their B is zero still.

    Of an adapter a gradient of zeros counts as none; of an embedding's rows, say, all may be absent from a window.
    """
    adapters = [name for name in trainable if ".lora_A." in name or ".lora_B." in name]
    given = [name for name in adapters if trainable[name].grad is not None]
    alive = [trainable[name].grad.any() for name in given]  # type: ignore[union-attr]  # not None, see above
    zero = {name for name, lives in zip(given, torch.stack(alive).tolist() if alive else [], strict=True) if not lives}
    waiting = [name for name in adapters if ".lora_A." in name and not _has_moved(name, trainable)]
    dead = [name for name, p in trainable.items() if p.grad is None or name in zero - set(waiting)]
    return dead, waiting


def _has_moved(name_of_a: str, trainable: Mapping[str, nn.Parameter]) -> bool:
    b = trainable.get(name_of_a.replace(".lora_A.", ".lora_B."))
    return b is not None and bool(b.detach().any())


def check_trainer(precision: str, strategy: str, quantization: str) -> None:
    """Refuse Trainer settings under which training would go wrong without a word.

    Args:
        precision: Lightning's name, as ``32-true``.
        strategy: Class name of Lightning's strategy.
        quantization: How the base is stored.

    Raises:
        UserError: The adapters would lose precision, or the strategy would break a quantized base.
    """
    if precision.endswith("-true") and precision != "32-true":
        raise UserError(
            f"trainer.precision is {precision}: it would cast the adapters' float32 masters down, and small updates "
            "would vanish. Leave it at 32-true; the products are computed in model.compute_dtype anyway."
        )
    if "FSDP" in strategy or "DeepSpeed" in strategy or "ModelParallel" in strategy:
        raise UserError(
            f"trainer.strategy is {strategy}, which shards parameters: with a base quantized as {quantization} that is "
            "silently wrong or unverified. Use `trainer.strategy: ddp`: each device holds its own small base."
        )
