"""Checks of a module, its Trainer and its data, where a run starts."""

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from qlora_lightning.model.checkpoint.format import read_checkpoint
from qlora_lightning.model.guards.checks import check_callbacks, check_trainer
from qlora_lightning.model.step.batch import check_row_length
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import callbacks_of, datamodule_of


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


def check_start(module: Any, needed: tuple[type, ...]) -> None:
    """Check what a module runs with, before its model is made; a fit needs some callbacks."""
    if module.fast and module._compiler_ctx is not None:
        raise UserError(
            "The module is compiled by torch.compile, which breaks the backward of its fused layers: pass it as it is, "
            "or set model.fast to false."
        )
    trainer = module._trainer
    if trainer is None:
        return
    if trainer.state.fn == TrainerFn.FITTING:
        check_callbacks(callbacks_of(trainer), *needed)
    check_trainer(str(trainer.precision), type(trainer.strategy), module.quantization, trainer.world_size)


def check_fit(module: Any) -> None:
    """Check what would show only at some step of a fit."""
    data = datamodule_of(module.trainer)
    check_row_length(module.causal_lm.config, getattr(data, "max_length", 0))
