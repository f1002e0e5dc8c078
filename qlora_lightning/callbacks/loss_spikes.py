"""Flags losses that jump out of the recent ones, with the rows that were in the step."""

import math
import statistics
from collections import deque
from typing import Any

import rich
from lightning import Callback, LightningModule, Trainer
from rich.markup import escape

from qlora_lightning.callbacks.run_report import note_warning
from qlora_lightning.model.batch import join_places, row_places
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import gather_lists

_LEAST_SHARE = 0.01  # of the median: where losses hardly differ, their deviation says nothing


class LossSpikeMonitor(Callback):
    """Report when the loss of an optimizer step is far above those of the last steps, and name its rows.

    Far above is more than ``deviations`` times the median absolute deviation above the median, a deviation being taken
    as at least 1 % of the median. Losses that are NaN or infinite are left to ``model.on_nonfinite``. The rows are
    those of all ranks; their places (``train.jsonl:17``) are known with our data module.

    Args:
        enabled: ``False`` reports nothing.
        monitor: Logged metric to watch.
        deviations: How far above the median is a spike.
        steps: How many of the last steps are compared with.
        least_steps: How many must have been seen before.
        pause: Least steps between two reports.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(
        self,
        enabled: bool = True,
        monitor: str = "train_loss",
        deviations: float = 6.0,
        steps: int = 100,
        least_steps: int = 30,
        pause: int = 10,
    ) -> None:
        if deviations <= 0:
            raise UserError(f"deviations of LossSpikeMonitor is {deviations}: expected a number above 0, such as 6.")
        if not 2 <= least_steps <= steps:
            raise UserError(f"least_steps of LossSpikeMonitor is {least_steps}: expected 2 to steps, which is {steps}.")
        self.enabled, self.monitor = enabled, monitor
        self.deviations, self.least_steps, self.pause = deviations, least_steps, pause
        self._losses: deque[float] = deque(maxlen=steps)
        self._reported_at: int | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.enabled or trainer.global_step == self._step:
            return  # inside an accumulation window
        loss = trainer.callback_metrics.get(self.monitor)
        if loss is not None:
            # Every rank must come to the same result: all of them send their rows then.
            mean = loss
            if trainer.world_size > 1:
                mean = trainer.strategy.reduce(loss.detach().to(trainer.strategy.root_device), reduce_op="mean")
            window = getattr(pl_module, "window", None)
            self._check(trainer, float(mean), getattr(window, "closed_row_ids", []))

    def _check(self, trainer: Trainer, loss: float, row_ids: list[int]) -> None:
        if not math.isfinite(loss):
            return
        losses, step = self._losses, self._step
        if len(losses) >= self.least_steps and (self._reported_at is None or step - self._reported_at >= self.pause):
            median = statistics.median(losses)
            deviation = statistics.median(abs(other - median) for other in losses)
            if loss > median + self.deviations * max(deviation, _LEAST_SHARE * abs(median)):
                self._reported_at = step
                self._report(trainer, loss, median, row_ids)
        losses.append(loss)

    def _report(self, trainer: Trainer, loss: float, median: float, row_ids: list[int]) -> None:
        row_ids = gather_lists(trainer, row_ids)
        if trainer.is_global_zero:
            rows = join_places(row_places(getattr(trainer, "datamodule", None), row_ids), most=16)
            found = f"{self.monitor} {loss:.4g} at step {self._step}, the median of the last {len(self._losses)} is"
            found = f"{found} {median:.4g}; rows {rows}."
            rich.print(f"[yellow]Loss spike:[/yellow] {escape(found)}")
            note_warning(trainer, f"Loss spike: {found}")

    def state_dict(self) -> dict[str, Any]:
        """Return the losses seen."""
        return {"losses": list(self._losses), "said_at": self._reported_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with them."""
        self._losses.clear()
        self._losses.extend(state_dict["losses"])
        self._reported_at = state_dict["said_at"]
