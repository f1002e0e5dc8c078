"""Flags losses that jump out of the recent ones, with the rows that were in the step."""

import math
import statistics
from collections import deque
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.markup import escape

from qlora_lightning.callbacks.run_report import note_warning
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.model.step.batch import format_locations, row_locations
from qlora_lightning.support.console import terminal
from qlora_lightning.support.trainer import datamodule_of, gather_lists

_MOST_LOSSES, _FEWEST_LOSSES = 100, 30  # of the last steps, which a loss is compared with
_PAUSE = 10  # steps between two reports, at least
_LEAST_SHARE = 0.01  # of the median: where losses hardly differ, their deviation says nothing


class LossSpikeMonitor(Callback):
    """Report when the loss of an optimizer step is far above those of the last 100 steps, and name its rows.

    Far above is more than ``deviations`` times the median absolute deviation above the median, a deviation being taken
    as at least 1 % of the median. Losses that are NaN or infinite are left to ``model.on_nonfinite``. The rows are
    those of all ranks; their places (``train.jsonl:17``) are known with our data module.

    Args:
        enabled: ``False`` reports nothing.
        deviations: How far above the median is a spike.
    """

    def __init__(self, enabled: bool = True, deviations: float = 6.0) -> None:
        self.enabled, self.deviations = enabled, deviations
        self._losses: deque[float] = deque(maxlen=_MOST_LOSSES)
        self._reported_at: int | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self.enabled or trainer.global_step == self._step or "train_loss" not in trainer.callback_metrics:
            return  # mostly inside an accumulation window
        loss = trainer.callback_metrics["train_loss"]
        if trainer.world_size > 1 and not isinstance(pl_module, QLoRAModule):  # ours logs that of all ranks
            loss = trainer.strategy.reduce(loss.detach().to(trainer.strategy.root_device), reduce_op="mean")
        if math.isfinite(loss):
            self._compare(trainer, pl_module, float(loss))
            self._losses.append(float(loss))

    def _compare(self, trainer: Trainer, pl_module: LightningModule, loss: float) -> None:
        losses, step = self._losses, self._step
        if len(losses) < _FEWEST_LOSSES or (self._reported_at is not None and step - self._reported_at < _PAUSE):
            return
        median = statistics.median(losses)
        deviation = statistics.median(abs(other - median) for other in losses)
        if loss <= median + self.deviations * max(deviation, _LEAST_SHARE * abs(median)):
            return
        self._reported_at = step
        # every rank has come to the same result
        row_ids = gather_lists(trainer, getattr(getattr(pl_module, "window", None), "last_row_ids", []))
        if trainer.is_global_zero:
            rows = format_locations(row_locations(datamodule_of(trainer), row_ids), most=16)
            found = (
                f"train_loss {loss:.4g} at step {step}, the median of the last {len(losses)} is {median:.4g}; "
                f"rows {rows}."
            )
            terminal().print(f"[yellow]Loss spike:[/yellow] {escape(found)}")
            note_warning(trainer, f"Loss spike: {found}")

    def state_dict(self) -> dict[str, Any]:
        """Return the losses seen."""
        return {"losses": list(self._losses), "said_at": self._reported_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with them."""
        self._losses.clear()
        self._losses.extend(state_dict["losses"])
        self._reported_at = state_dict["said_at"]
