"""Checks of what silently breaks training: Trainer settings, training mode, token ids, gradients."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import Strategy
from torch import nn

from qlora_lightning.model.sharded.strategy import ShardedDDPStrategy
from qlora_lightning.model.step.batch import join_places, row_places
from qlora_lightning.support.errors import UserError

# ---- before training -------------------------------------------------------------------------------------------------


def check_trainer(precision: str, strategy: type[Strategy], quantization: str, processes: int = 1) -> None:
    """Reject Trainer settings under which training would silently go wrong."""
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
            f"{quantization} that is silently wrong or unverified. Use `ddp`, or `ddp_sharded` for a base that no "
            "device can hold."
        )
    if issubclass(strategy, ShardedDDPStrategy) and quantization == "int8":
        raise UserError(
            "trainer.strategy ddp_sharded shards bases in 4 bits or in 16, and model.quantization is int8, of which "
            "that is untested: set nf4, or train with `ddp`."
        )


def check_callbacks(callbacks: Iterable[object], *required: type) -> None:
    """Reject a fit without the callbacks that the module brings along, or with averages of the whole model."""
    present = list(callbacks)
    for callback in present:
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise UserError(
                f"{type(callback).__name__} averages the weights of a whole model, which here are the packed bytes of "
                "a frozen base. Average the adapter instead: `ema: {decay: 0.999}` in the config, AdapterEMA() in "
                "Python."
            )
    missing = [kind.__name__ for kind in required if not any(isinstance(callback, kind) for callback in present)]
    if missing:
        raise RuntimeError(
            f"{missing[0]} is missing, and runs would not resume, or not be watched over: return "
            "`[*super().configure_callbacks(), …]` from `configure_callbacks`."
        )


# ---- in a step -------------------------------------------------------------------------------------------------------


def check_training_mode(model: nn.Module) -> None:
    """Reject a model that generation, say, left in evaluation mode: dropout and checkpointing would silently be off."""
    in_eval = [name for name, module in model.named_modules() if not module.training]
    if in_eval:
        raise RuntimeError(
            f"The model is in evaluation mode in a training step ({len(in_eval)} modules, as {in_eval[0] or 'all'}): "
            "dropout and activation checkpointing would be off. "
            "A callback or hook called `model.eval()` or `generate`; call `model.train()` after it."
        )


def check_token_ids(batch: Mapping[str, Any], vocabulary: int, data: Any) -> None:
    """Reject a token id of a flat batch that is not one of the ``vocabulary`` rows of the embedding.

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


def check_held(trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Reject an optimizer that was not given every tensor that trains: it would stay as it is."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in trainable.items() if id(parameter) not in held]
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(trainable)} trainable tensors are in none of the optimizer's groups, as "
            f"{', '.join(missing[:3])}: they would never learn. Let `parameter_groups` return every trainable tensor."
        )


def check_gradients(trainable: Mapping[str, nn.Parameter]) -> bool:
    """Reject adapters that get no gradient.

    B has one from the first step. A's is exactly zero until B has moved away from zero, so A is asked only then. Of an
    adapter a gradient of zeros counts as none; of an embedding's rows, say, all may be absent from a window.

    Returns:
        Whether all could be asked: not yet while an A waits for its B.
    """
    dead, waits = [], False
    for name, parameter in trainable.items():
        if parameter.grad is None:
            dead.append(name)
        elif ".lora_A." in name and not trainable[name.replace(".lora_A.", ".lora_B.")].detach().any():
            waits = True
        elif (".lora_A." in name or ".lora_B." in name) and not parameter.grad.any():
            dead.append(name)
    if dead:
        raise RuntimeError(
            f"{len(dead)} of {len(trainable)} trainable tensors get no gradient, as {', '.join(dead[:3])}: they would "
            "never learn. A frozen layer passes no gradient, compute_loss does not use them, or training has diverged "
            "(lower model.learning_rate)."
        )
    return not waits
