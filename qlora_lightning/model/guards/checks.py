"""Checks of what silently breaks training: where a run starts, and in a step."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from qlora_lightning.model.checkpoint.format import read_checkpoint
from qlora_lightning.model.sharded import ShardedDDPStrategy
from qlora_lightning.model.step.batch import format_locations, row_locations
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import callbacks_of, datamodule_of, find_callback

# ---- where a run starts ----------------------------------------------------------------------------------------------


def check_setup(module: Any) -> None:
    """Check the checkpoint and the data of a run, before anything is loaded."""
    # Lightning warns of these hooks beside a data module that has none of its own.
    warnings.filterwarnings("ignore", "You have overridden `on_(before|after)_batch_transfer` in `LightningModule`")
    if Path(module.trainer.ckpt_path or "").is_file():
        read_checkpoint(str(module.trainer.ckpt_path), mmap=True)  # before Lightning does, in torch's words
    data = datamodule_of(module.trainer)
    if getattr(data, "pairs", module.pairs) != module.pairs:
        raise UserError(
            f"{type(module).__name__} cannot train on {type(data).__name__}: preferences take "
            "qlora_lightning.PreferenceModule as model and qlora_lightning.PreferenceDataModule as data."
        )


def check_start(module: Any, needed: tuple[type[Callback], ...]) -> None:
    """Check what a module runs with, before its model is built; a fit needs some callbacks."""
    trainer = module._trainer
    if trainer is None:
        return
    if trainer.state.fn == TrainerFn.FITTING:
        if module.overrides("training_step"):
            raise UserError(
                f"{type(module).__name__} overrides training_step, which computes the gradients itself: a loss that it "
                "returns would change nothing. Override compute_loss, or use a callback."
            )
        for callback in callbacks_of(trainer):
            if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
                name = type(callback).__name__
                raise UserError(f"{name} averages the whole model, a frozen base's packed bytes too: leave it out.")
        if missing := [kind.__name__ for kind in needed if find_callback(trainer, kind) is None]:
            raise RuntimeError(
                f"{missing[0]} is missing, and runs would not resume, or not be watched over: return "
                "`[*super().configure_callbacks(), …]` from `configure_callbacks`."
            )
    check_trainer(str(trainer.precision), type(trainer.strategy), module.quantization)


def check_trainer(precision: str, strategy: type[Strategy], quantization: str) -> None:
    """Reject Trainer settings under which training would silently go wrong."""
    if precision != "32-true":
        raise UserError(
            f"trainer.precision is {precision}: leave it at 32-true, that of the adapters, which in 16 bits would lose "
            "small updates. All products are computed in model.compute_dtype anyway."
        )
    kinds = " ".join(kind.__name__ for kind in strategy.__mro__)
    if any(kind in kinds for kind in ("FSDP", "DeepSpeed", "ModelParallel")):
        raise UserError(
            f"trainer.strategy is {strategy.__name__}, which shards parameters: of a quantized base that is silently "
            "wrong or unverified. Use `ddp`, or `ddp_sharded` for a base that no device can hold."
        )
    if issubclass(strategy, ShardedDDPStrategy) and quantization == "int8":
        raise UserError("trainer.strategy ddp_sharded is untested with model.quantization int8: set nf4, or use `ddp`.")


# ---- in a step -------------------------------------------------------------------------------------------------------


def check_training_mode(model: nn.Module) -> None:
    """Reject a model that generation, say, left in evaluation mode."""
    in_eval = [name for name, module in model.named_modules() if not module.training]
    if in_eval:
        raise RuntimeError(
            f"The model is in evaluation mode in a training step ({len(in_eval)} modules, as {in_eval[0] or 'all'}), "
            "without dropout and activation checkpointing: call `model.train()` after `model.eval()` or `generate`."
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
    place = f" of {format_locations(row_locations(data, rows))}" if rows else ""
    raise UserError(
        f"A token{place} has the id {int(ids[first]):,}, and the base has embeddings only for ids below "
        f"{vocabulary:,}: the tokenizer has tokens that the base lacks, such as a stop token. Use the base's own "
        "tokenizer, or a base whose embedding was resized for this one."
    )


def check_gradients(trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> bool:
    """Reject trainable tensors that the optimizer was not given, or that get no gradient.

    Of A and B a gradient of zeros counts as none. A's is zero until B has moved away from zero, so A is checked only
    then: the result is whether all tensors were.
    """
    in_groups = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    without_group, without_gradient, waits = [], [], False
    for name, parameter in trainable.items():
        lora_B = trainable.get(name.replace(".lora_A.", ".lora_B."), parameter)
        if id(parameter) not in in_groups:
            without_group.append(name)
        elif parameter.grad is None:
            without_gradient.append(name)
        elif ".lora_A." in name and not lora_B.detach().any():
            waits = True
        elif (".lora_A." in name or ".lora_B." in name) and not parameter.grad.any():
            without_gradient.append(name)
    if without_group:
        raise RuntimeError(
            f"{len(without_group)} of {len(trainable)} trainable tensors are in none of the optimizer's groups, as "
            f"{', '.join(without_group[:3])}: they would never learn. Let `parameter_groups` return them."
        )
    if without_gradient:
        raise RuntimeError(
            f"{len(without_gradient)} of {len(trainable)} trainable tensors get no gradient, as "
            f"{', '.join(without_gradient[:3])}: they would never learn. A frozen layer passes no gradient, "
            "compute_loss does not use them, or training has diverged (lower model.learning_rate)."
        )
    return not waits
