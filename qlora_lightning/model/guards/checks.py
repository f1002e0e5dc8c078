"""Checks of what silently breaks training: Trainer settings, training mode, token ids, gradients."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import Strategy
from torch import nn

from qlora_lightning.model.sharded.strategy import ShardedDDPStrategy
from qlora_lightning.model.step.batch import join_places, row_places
from qlora_lightning.support.errors import UserError

# ---- before training -------------------------------------------------------------------------------------------------


def check_trainer(precision: str, strategy: type[Strategy], quantization: str, processes: int = 1) -> None:
    """Refuse Trainer settings under which training would silently go wrong."""
    if precision == "16-mixed" and processes > 1:  # each would skip steps by its own gradients, before they are added
        raise UserError(
            f"trainer.precision is 16-mixed with {processes} processes, whose adapters would drift apart. Leave it at "
            "32-true: model.compute_dtype: fp16 computes in 16 bits, and scales the loss by itself."
        )
    if precision.endswith("-true") and precision != "32-true":
        raise UserError(
            f"trainer.precision is {precision}: it would cast the adapters' float32 masters down, and small updates "
            "would vanish. Leave it at 32-true; the products are computed in model.compute_dtype anyway."
        )
    kinds = " ".join(kind.__name__ for kind in strategy.__mro__)
    if any(kind in kinds for kind in ("FSDP", "DeepSpeed", "ModelParallel")):
        raise UserError(
            f"trainer.strategy is {strategy.__name__}, which shards parameters: with a base quantized as "
            f"{quantization} that is silently wrong or unverified. Use `ddp`: each device holds its own small base. "
            "`ddp_sharded` shards a base that no device can hold."
        )
    if issubclass(strategy, ShardedDDPStrategy) and quantization == "int8":
        raise UserError(
            "trainer.strategy ddp_sharded shards bases in 4 bits or in 16, and model.quantization is int8, of which "
            "that is untested: set nf4, or train with `ddp`."
        )


def check_callbacks(callbacks: Iterable[object], *needed: type) -> None:
    """Refuse to train without the callbacks that the module itself brings along, or with averages of the whole model.

    The copy that Lightning's callbacks average is made before there is a model, or holds the packed bytes of the base.
    """
    present = list(callbacks)
    for callback in present:
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise UserError(
                f"{type(callback).__name__} averages the weights of a whole model, which here are the packed bytes of "
                "a frozen base. Average the adapter instead: `ema: {decay: 0.999}` in the config, AdapterEMA() in "
                "Python."
            )
    missing = [kind.__name__ for kind in needed if not any(isinstance(callback, kind) for callback in present)]
    if missing:
        raise RuntimeError(
            f"{missing[0]} is missing, and runs would not resume, or not be watched over: return "
            "`[*super().configure_callbacks(), …]` from `configure_callbacks`."
        )


def refuse_found_rate(callbacks: Iterable[object]) -> None:
    """Report the learning rate that a LearningRateFinder of the Trainer has found, instead of training with it.

    The schedule would return to the configured rate at the second step, and a checkpoint that is resumed is forgotten.
    """
    for finder in callbacks:
        if isinstance(finder, LearningRateFinder):
            rate = finder.optimal_lr and finder.optimal_lr.suggestion()
            raise UserError(
                f"LearningRateFinder found {'no learning rate' if rate is None else f'the learning rate {rate:.3g}'}. "
                "Lightning would use it for the first step alone, and could not resume: set model.learning_rate "
                "yourself, and remove LearningRateFinder from trainer.callbacks."
            )


def check_training_mode(model: nn.Module) -> None:
    """Refuse a model that generation, say, left in evaluation mode: dropout and checkpointing would silently be off."""
    asleep = [name for name, module in model.named_modules() if not module.training]
    if asleep:
        raise RuntimeError(
            f"The model is in evaluation mode in a training step ({len(asleep)} modules, as {asleep[0] or 'all'}): "
            "dropout and activation checkpointing would be off. "
            "A callback or hook called `model.eval()` or `generate`; call `model.train()` after it."
        )


def check_token_ids(batch: Mapping[str, Any], vocabulary: int, data: Any) -> None:
    """Refuse a token id of a flat batch that is not one of the ``vocabulary`` rows of the embedding.

    A stop token at the end of rows is never looked up there: only the loss would meet it, as a label. The place of its
    row comes from ``data``, the Trainer's data module, if there is one.
    """
    ids = batch["input_ids"][0]
    first = ((ids < 0) | (ids >= vocabulary)).nonzero()[:1, 0]
    if not len(first):
        return
    sample = int(torch.searchsorted(batch["cu_seqlens"].to(first), first, right=True)) - 1
    rows = [] if batch.get("row_ids") is None else batch["row_ids"][sample : sample + 1].tolist()
    place = f" of {join_places(row_places(data, rows))}" if rows else ""
    raise UserError(
        f"A token{place} has the id {int(ids[first]):,}, and the base has embeddings only for ids below "
        f"{vocabulary:,}: the tokenizer has tokens that the base lacks, such as a stop token that was added to it. "
        "Use the base's own tokenizer, or a base whose embedding was resized for this one."
    )


# ---- the adapters ----------------------------------------------------------------------------------------------------

_GROWN = 1.0  # A begins below it, B at zero, and sound training leaves both far below


def check_held(trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that was not given every tensor that trains: it would stay as it is."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left = [name for name, parameter in trainable.items() if id(parameter) not in held]
    if left:
        raise RuntimeError(
            f"{len(left)} of {len(trainable)} trainable tensors are in none of the optimizer's groups, as "
            f"{', '.join(left[:3])}: they would stay as they are. Let `parameter_groups` return every trainable tensor."
        )


def check_gradients(trainable: Mapping[str, nn.Parameter]) -> bool:
    """Refuse adapters that get no gradient.

    B has one from the first step. A's is exactly zero until B has moved away from zero, so A is asked only then. Of an
    adapter a gradient of zeros counts as none; of an embedding's rows, say, all may be absent from a window.

    Returns:
        Whether all could be asked: not yet while an A waits for its B.
    """
    dead, waits = [], False
    for name, parameter in trainable.items():
        is_a, is_b = ".lora_A." in name, ".lora_B." in name
        if parameter.grad is None:
            dead.append(name)
        elif is_a and not trainable[name.replace(".lora_A.", ".lora_B.")].detach().any():
            waits = True
        elif (is_a or is_b) and not parameter.grad.any():
            dead.append(name)
    if dead:
        adapters = [tensor.detach() for name, tensor in trainable.items() if ".lora_" in name]
        largest = max((float(each.abs().max().nan_to_num(nan=math.inf)) for each in adapters), default=0.0)
        cause = "A frozen layer passes no gradient, or compute_loss does not use them."
        if largest > _GROWN:
            cause = f"Training has diverged, to weights up to {largest:.3g}: lower model.learning_rate and start again."
        raise RuntimeError(
            f"{len(dead)} of {len(trainable)} trainable tensors get no gradient, as {', '.join(dead[:3])}: they would "
            f"never learn. {cause}"
        )
    return not waits
