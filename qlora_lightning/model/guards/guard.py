"""Stops a run that would train for nothing: losses that are not finite, adapters that do not learn."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

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

OnNonfinite = Literal["stop", "skip"]
_MOST_SKIPPED = 20  # in a row

_log = logging.getLogger(__name__)


class TrainingGuard(Callback):
    """Check each optimizer step before it is taken, and each validation before it is saved.

    The module brings it along by ``configure_callbacks`` and calls :meth:`check_step`.

    Args:
        on_nonfinite: What to do when a loss or a gradient is NaN or infinite: ``stop`` the run, or ``skip`` the step.
            A skipped step moves neither the adapters nor the optimizer's state, and counts as a step of the schedule.
            After 20 of them in a row the run stops all the same. A validation loss of that kind stops the run too.

    Attributes:
        checks_due: Whether the next step is looked at closely: the first one, and the first after each validation.
        skipped_steps: How many steps were left out since the run began, resumes included.
    """

    def __init__(self, on_nonfinite: OnNonfinite = "stop") -> None:
        self.on_nonfinite = on_nonfinite
        self.checks_due = True
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._last_loss: float | None = None  # of the step before, if this process took it

    # ---- before each optimizer step --------------------------------------------------------------------------------

    def check_step(
        self,
        pl_module: Any,
        optimizer: torch.optim.Optimizer,
        means: Mapping[str, Tensor],
        totals: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Stop, skip or pass a step by its mean ``loss`` and ``grad_norm``; return all on the host, for the log.

        They are those of all ranks, which so decide alike. The one time in a step that the host waits for a GPU.
        """
        trainer = pl_module.trainer
        # Under 16-mixed the scaler itself skips steps with infinite gradients: they are how it finds its scale.
        scales = getattr(trainer.precision_plugin, "scaler", None) is not None
        numbers = torch.stack([each.detach().double() for each in (*means.values(), *totals.values())]).cpu()
        on_host = {name: number.float() for name, number in zip(means, numbers, strict=False)}
        counted = dict(zip(totals, numbers[len(means) :].tolist(), strict=True))
        bad_loss, bad_gradient = (not math.isfinite(on_host[name]) for name in ("loss", "grad_norm"))
        if self not in callbacks_of(trainer):
            # Lightning's search for a learning rate runs without them, and ends where training diverges.
            trainer.should_stop = trainer.should_stop or bad_loss or bad_gradient
            return on_host, counted
        if bad_loss or (bad_gradient and not scales):
            self._handle_nonfinite(pl_module, optimizer, "loss" if bad_loss else "gradient")
        elif not bad_gradient:
            self._skipped_in_a_row = 0
            if self.checks_due and counted["labelled_tokens"]:  # without labels gradients of zero are right
                self.checks_due = not check_gradients(trainable_tensors(pl_module), optimizer)
        self._last_loss = float(on_host["loss"])
        return on_host, counted

    def _handle_nonfinite(self, pl_module: Any, optimizer: torch.optim.Optimizer, what: str) -> None:
        """Stop the run, or leave the step out; every rank must call it."""
        trainer, rate = pl_module.trainer, float(optimizer.param_groups[0]["lr"])
        rows = format_locations(gather_lists(trainer, row_locations(datamodule_of(trainer), pl_module.window.row_ids)))
        before = "" if self._last_loss is None else f" The loss of the step before was {self._last_loss:.4g}."
        fault = (
            f"The {what} of step {trainer.global_step}, at learning rate {rate:.3g}, is NaN or infinite.{before} "
            f"Rows of the step: {rows}."
        )
        if self.on_nonfinite == "stop":
            remedy = "Look at these rows, lower model.learning_rate, or skip such steps by model.on_nonfinite: skip."
            if pl_module.identity.get("compute_dtype") == "float16":
                remedy = f"First use bf16 or fp32 (`model.compute_dtype`): fp16 ends at 65,504. {remedy}"
            raise UserError(f"{fault} {remedy}")
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= _MOST_SKIPPED:
            raise UserError(
                f"{fault} The last {_MOST_SKIPPED} steps were all like this, and skipped (model.on_nonfinite: skip): "
                "this is not a bad row. Lower model.learning_rate, or set model.compute_dtype: fp32 to compare."
            )
        if trainer.is_global_zero:
            _log.warning("%s Step skipped (model.on_nonfinite: skip), %d so far.", fault, self.skipped_steps)
        optimizer.zero_grad(set_to_none=True)

    # ---- around training and validations -----------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finder = find_callback(trainer, LearningRateFinder)
        if finder is not None:  # the schedule would return to the configured rate at the second step
            rate = finder.optimal_lr and finder.optimal_lr.suggestion()
            raise UserError(
                f"LearningRateFinder found the learning rate {rate}, which Lightning would use for the first step "
                "alone: set model.learning_rate to it, and remove LearningRateFinder from trainer.callbacks."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.checks_due = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.checks_due = True  # an evaluation pass is what breaks training elsewhere
        loss = trainer.callback_metrics.get("val_loss")
        if self.on_nonfinite == "stop" and loss is not None and not loss.isfinite():
            has_saved = (Path(trainer.default_root_dir) / CHECKPOINTS / "last.ckpt").exists()
            before = ": `--ckpt_path last` is from before" if has_saved else ""
            raise UserError(  # before callbacks that write checkpoints, which come last
                f"The validation at step {trainer.global_step} gave a val_loss of {float(loss)}. Nothing of it is "
                f"saved{before}. Lower model.learning_rate, look at the validation rows, or set model.on_nonfinite: "
                "skip to continue."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped_steps = state_dict["skipped_steps"]
        self._skipped_in_a_row = state_dict["skipped_in_a_row"]
