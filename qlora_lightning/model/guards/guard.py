"""Stops a run that would train for nothing: losses that are not finite, adapters that do not learn."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.guards.checks import check_gradients
from qlora_lightning.model.step.batch import format_locations, row_locations
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import CHECKPOINTS
from qlora_lightning.support.trainer import callbacks_of, datamodule_of, find_callback, gather_lists


class TrainingGuard(Callback):
    """Check each optimizer step before it is taken, and each validation before it is saved.

    The module brings it along by ``configure_callbacks`` and calls :meth:`check_step`.

    Attributes:
        checks_due: Whether the next step is looked at closely: the first one, and the first after each validation.
    """

    def __init__(self) -> None:
        self.checks_due = True
        self._last_loss: float | None = None  # of the step before, if this process took it

    # ---- before each optimizer step --------------------------------------------------------------------------------

    def check_step(
        self,
        pl_module: Any,
        optimizer: torch.optim.Optimizer,
        means: Mapping[str, Tensor],
        totals: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Stop the run if the mean ``loss`` or ``grad_norm`` is not finite; return all on the host, for the log.

        They are those of all ranks, which so decide alike. The one time in a step that the host waits for a GPU.
        """
        trainer = pl_module.trainer
        numbers = torch.stack([each.detach().double() for each in (*means.values(), *totals.values())]).cpu()
        on_host = {name: number.float() for name, number in zip(means, numbers, strict=False)}
        counted = dict(zip(totals, numbers[len(means) :].tolist(), strict=True))
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(on_host[name])]
        if self not in callbacks_of(trainer):
            # Lightning's search for a learning rate runs without them, and ends where training diverges.
            trainer.should_stop = trainer.should_stop or bool(bad)
        elif bad:
            self._stop(pl_module, optimizer, "loss" if "loss" in bad else "gradient")
        elif self.checks_due and counted["labelled_tokens"]:  # without labels gradients of zero are right
            self.checks_due = not check_gradients(trainable_tensors(pl_module), optimizer)
        self._last_loss = float(on_host["loss"])
        return on_host, counted

    def _stop(self, pl_module: Any, optimizer: torch.optim.Optimizer, what: str) -> None:
        """Stop the run, and name the rows of the step; every rank must call it."""
        trainer, rate = pl_module.trainer, float(optimizer.param_groups[0]["lr"])
        rows = format_locations(gather_lists(trainer, row_locations(datamodule_of(trainer), pl_module.window.row_ids)))
        before = "" if self._last_loss is None else f" The loss of the step before was {self._last_loss:.4g}."
        is_fp16 = pl_module.identity.get("compute_dtype") == "float16"
        first = "First use bf16 or fp32 (`model.compute_dtype`): fp16 ends at 65,504. " if is_fp16 else ""
        raise UserError(
            f"The {what} of step {trainer.global_step}, at learning rate {rate:.3g}, is NaN or infinite.{before} Rows "
            f"of the step: {rows}. {first}Look at these rows, or lower model.learning_rate."
        )

    # ---- around training and validations -----------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if find_callback(trainer, LearningRateFinder) is not None:  # that of Tuner.lr_find ends before this
            raise UserError(
                "LearningRateFinder in trainer.callbacks would give its rate to the first step alone: call Lightning's "
                "Tuner(trainer).lr_find, and set model.learning_rate to what it finds."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.checks_due = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.checks_due = True  # an evaluation pass is what breaks training elsewhere
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None and not loss.isfinite():
            has_saved = (Path(trainer.default_root_dir) / CHECKPOINTS / "last.ckpt").exists()
            before = ": `--ckpt_path last` is from before" if has_saved else ""
            raise UserError(  # before callbacks that write checkpoints, which come last
                f"The validation at step {trainer.global_step} gave a val_loss of {float(loss)}. Nothing of it is "
                f"saved{before}. Lower model.learning_rate, or look at the validation rows."
            )
