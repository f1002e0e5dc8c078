"""Writes the config of a run into its folder, and goes on in the same files where it is resumed."""

from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.callbacks.started_folder import goes_on, refuse_everywhere, refuse_started_folder, writing_to
from qlora_lightning.model.checkpoint.format import KEY
from qlora_lightning.support.console import say
from qlora_lightning.support.files import write_whole
from qlora_lightning.support.trainer import is_trial_run

_TABLE = "metrics_table"  # key of a checkpoint


class RunFolder(Callback):
    """Write ``config.yaml`` at the start of a fit, hand it to loggers, and go on in ``metrics.csv``.

    A run that is resumed cuts that table where its checkpoint was.

    Args:
        config: The whole config of the run, in the form that ``--config`` reads.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self._table: dict[str, Any] | None = None
        self._planned: dict[str, Any] | None = None  # lengths and learning rate of the run that is resumed
        self._line_follows = False  # the line of a step is written after the hooks of its batch

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_trial_run(trainer):
            return
        folder = Path(trainer.default_root_dir)
        if not goes_on(trainer):  # the command line has looked; but a run may have come and gone since
            refuse_everywhere(trainer, lambda: refuse_started_folder(folder, trainer.ckpt_path))
        if trainer.is_global_zero:
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            with writing_to(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / "config.yaml", text)
        for logger in trainer.loggers:
            try:
                logger.log_hyperparams(self.config)
            except Exception as fault:  # as MLflow, where a resumed run has other values: no reason not to train
                say(f"{type(logger).__name__} does not take the config: {type(fault).__name__}: {fault}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in _tables(trainer):
            checkpoint[_TABLE] = {"rows": logger.rows, "line_follows": self._line_follows}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A checkpoint from elsewhere does not know the table: then the steps alone say what stays.
        self._table = checkpoint.get(_TABLE, {"rows": 0, "line_follows": True})
        for optimizer in checkpoint["optimizer_states"][:1]:  # none in one that was saved before a fit
            rate = optimizer["param_groups"][0]["lr"]
            self._planned = {**checkpoint.get(KEY, {}).get("trainer", {}), "rate": rate}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        table, self._table, self._line_follows = self._table or {"rows": 0}, None, False
        for logger in _tables(trainer):
            logger.cut(table["rows"], before_step=trainer.global_step if table.get("line_follows") else 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._line_follows = False
        if self._planned is not None:
            words = describe_length(self._planned, trainer)
            self._planned = None
            if words and trainer.is_global_zero:
                say(words)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._line_follows = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._line_follows = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._line_follows = False


def describe_length(planned: dict[str, Any], trainer: Trainer) -> str | None:
    """Say which schedule follows where a resumed run is to be longer or shorter than it was planned.

    Args:
        planned: ``max_epochs``, ``max_steps`` and ``accumulate_grad_batches`` of the run that is resumed, and the
            learning ``rate`` it stopped at.
        trainer: After the schedule has been put in its place.
    """
    names = ["max_epochs", "max_steps"]
    if trainer.max_steps == -1:  # then epochs count, which have more steps the fewer micro-batches a step has
        names.append("accumulate_grad_batches")
    changes = [
        f"trainer.{name} was {planned[name]} and is {getattr(trainer, name)}"
        for name in names
        if name in planned and planned[name] != getattr(trainer, name)
    ]
    if not changes:
        return None
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    return (
        f"{' and '.join(changes)}: the schedule is planned anew for the whole new length, and goes on at step "
        f"{trainer.global_step} with learning rate {rate:.3g} (by the old plan {planned['rate']:.3g})."
    )


def _tables(trainer: Trainer) -> list[MetricsLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsLogger)]
