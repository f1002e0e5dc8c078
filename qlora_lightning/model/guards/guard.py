"""Stops a run that would continue for nothing: losses that are not finite, adapters that stay, a base that changes."""

import contextlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.guards.checks import (
    check_frozen,
    check_gradients,
    check_held,
    checksum_frozen,
)
from qlora_lightning.model.guards.nonfinite import Finding, describe_findings, find_nonfinite
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import write_whole
from qlora_lightning.support.trainer import callbacks_of

OnNonfinite = Literal["stop", "skip"]
_MOST_REPORTS = 10  # of skipped steps: a run that skips often would fill its folder
_MOST_SKIPPED = 20  # in a row

_log = logging.getLogger(__name__)


class TrainingGuard(Callback):
    """Judges each optimizer step before it is taken, and the base after each validation.

    The module brings it along by ``configure_callbacks`` and asks it by :meth:`judge_step`.

    Args:
        on_nonfinite: What to do when a loss or a gradient is NaN or infinite: ``stop`` the run, or ``skip`` the step.
            A skipped step moves neither the adapters nor the optimizer's state; it counts as a step, so that the
            schedule continues. After 20 skipped steps in a row the run stops all the same. A validation loss of that
            kind stops the run too, or is reported.

    Attributes:
        checks_due: Whether the next step is looked at closely: the first one, and the first after each validation.
        skipped_steps: How many steps were left out since the run began, resumes included.
    """

    def __init__(self, on_nonfinite: OnNonfinite = "stop") -> None:
        self.on_nonfinite = on_nonfinite
        self.checks_due = True
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._frozen: dict[str, int] = {}

    # ---- before each optimizer step --------------------------------------------------------------------------------

    def judge_step(
        self, pl_module: Any, optimizer: torch.optim.Optimizer, means: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Judge a window by its mean ``loss`` and ``grad_norm`` over all ranks; without gradients a step is skipped.

        The one time in a step that the host waits for a GPU: all means are returned as it has read them, for the log.
        """
        trainer = pl_module.trainer
        # Under 16-mixed the scaler itself skips steps with infinite gradients: they are how it finds its scale.
        scales = getattr(trainer.precision_plugin, "scaler", None) is not None
        tokens = pl_module.window.labelled_tokens_of_all_ranks
        *numbers, labelled = torch.stack([each.detach().double() for each in (*means.values(), tokens)]).cpu().unbind()
        found = {name: number.float() for name, number in zip(means, numbers, strict=True)}
        # of all ranks, which decide alike
        bad_loss, bad_gradient = (not math.isfinite(found[name]) for name in ("loss", "grad_norm"))
        if self not in callbacks_of(trainer):
            # Lightning's search for a learning rate runs without them, and ends where training diverges.
            trainer.should_stop = trainer.should_stop or bad_loss or bad_gradient
            return found
        if bad_loss or (bad_gradient and not scales):
            self._handle_nonfinite(pl_module, optimizer, "loss" if bad_loss else "gradient")
        elif not bad_gradient:
            self._skipped_in_a_row = 0
            if self.checks_due and labelled:  # without labels gradients of zero are right
                trainable = trainable_tensors(pl_module)
                check_held(trainable, optimizer)
                self.checks_due = not check_gradients(trainable)
        return found

    def _handle_nonfinite(self, pl_module: Any, optimizer: torch.optim.Optimizer, what: str) -> None:
        trainer, rate = pl_module.trainer, float(optimizer.param_groups[0]["lr"])
        found = f"The {what} of step {trainer.global_step}, at learning rate {rate:.3g}, is NaN or infinite."
        if self.on_nonfinite == "stop" or self.skipped_steps < _MOST_REPORTS:
            data = getattr(trainer, "datamodule", None)
            mine = find_nonfinite(
                pl_module.model,
                pl_module.compute_loss,
                pl_module.window,
                data,
                trainer.global_rank,
                pl_module.sharded_base is not None,
            )
            findings: list[Finding] = [mine] * trainer.world_size
            if trainer.world_size > 1:
                torch.distributed.all_gather_object(findings, mine)
            found = f"{found} {describe_findings(findings)}"
            if trainer.is_global_zero:
                head = {"step": trainer.global_step, "what": what, "learning_rate": rate}
                file = Path(trainer.default_root_dir) / f"nonfinite-step-{trainer.global_step}.json"
                with contextlib.suppress(OSError):  # the step is decided, whatever the disk says
                    write_whole(file, {**head, "ranks": findings})
                    found = f"{found} Rows and text: {file}."
        if self.on_nonfinite == "stop":
            raise UserError(found)
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= _MOST_SKIPPED:
            raise UserError(
                f"{found} So were the {_MOST_SKIPPED} steps up to it, all of them skipped (model.on_nonfinite: skip): "
                "this is not a bad row. Lower model.learning_rate, or set model.compute_dtype: fp32 to compare."
            )
        if trainer.is_global_zero:
            _log.warning("%s Step skipped (model.on_nonfinite: skip), %d so far.", found, self.skipped_steps)
        optimizer.zero_grad(set_to_none=True)

    # ---- around validations ----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.checks_due = True
        self._frozen = checksum_frozen(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.checks_due = True  # an evaluation pass is what breaks training elsewhere
            check_frozen(self._frozen, checksum_frozen(pl_module))
            self._judge_validation(trainer)  # before callbacks that write checkpoints, which come last

    def _judge_validation(self, trainer: Trainer) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        if self.on_nonfinite == "stop" and loss is not None and not loss.isfinite():
            raise UserError(
                f"The validation at step {trainer.global_step} gave a val_loss of {float(loss)}. What gave it is not "
                "saved: a checkpoint from before is intact (`--ckpt_path last`). Lower model.learning_rate, look at "
                "the validation rows, or set model.on_nonfinite: skip to continue."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_frozen(self._frozen, checksum_frozen(pl_module))

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped_steps = state_dict["skipped_steps"]
        self._skipped_in_a_row = state_dict["skipped_in_a_row"]
