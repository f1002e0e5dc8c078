"""Keeps a run folder to one run and one process, and writes the run's config into it."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.callbacks.checkpoint_file import CHECKPOINTS, UNFINISHED
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import lock_folder, write_whole
from qlora_lightning.support.trainer import is_trial_run

_TABLE = "metrics_table"  # key of a checkpoint
_held: set[int] = set()  # descriptors of locked folders


class RunFolder(Callback):
    """Write ``config.yaml`` at the start of a fit, pass it to the loggers, and continue ``metrics.csv`` on a resume.

    A run that is resumed cuts that table where its checkpoint was.

    Args:
        config: The whole config of the run, in the form that ``--config`` reads.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self._table: dict[str, Any] | None = None
        self._line_follows = False  # the line of a step is written after the hooks of its batch

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_trial_run(trainer):
            return
        folder = Path(trainer.default_root_dir)
        if not is_resumed(trainer):  # the command line has looked, but a run may have come and gone since
            refuse_everywhere(trainer, lambda: refuse_started_folder(folder, trainer.ckpt_path))
        if trainer.is_global_zero:
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            with writing_to(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / "config.yaml", text)
        for logger in trainer.loggers:
            try:
                logger.log_hyperparams(self.config)
            except Exception as fault:  # as MLflow, if a resumed run has other values: no reason not to train
                say(f"{type(logger).__name__} does not take the config: {type(fault).__name__}: {fault}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in _tables(trainer):
            checkpoint[_TABLE] = {"rows": logger.rows, "line_follows": self._line_follows}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A checkpoint without the table was saved without this callback: then the steps alone say what stays.
        self._table = checkpoint.get(_TABLE, {"rows": 0, "line_follows": True})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        table, self._table, self._line_follows = self._table or {"rows": 0}, None, False
        for logger in _tables(trainer):
            logger.cut(table["rows"], before_step=trainer.global_step if table.get("line_follows") else 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._line_follows = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._line_follows = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._line_follows = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._line_follows = False


class FolderLock:
    """An exclusive lock on a run's checkpoint folder itself: no file is left behind, and a kill releases it too."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, run_folder: str | Path) -> None:
        """Make the checkpoint folder and lock it, if its file system has such locks (NFS has none for folders).

        Raises:
            UserError: The folder cannot be written to, or another process trains in it.
        """
        self.release()
        folder = Path(run_folder) / CHECKPOINTS
        with writing_to(run_folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        try:
            self._descriptor = lock_folder(folder)
        except BlockingIOError as error:
            raise UserError(
                f"Another process trains in {run_folder}: wait until it has ended, or choose another folder with "
                "`--trainer.default_root_dir runs/NAME`."
            ) from error
        if self._descriptor is not None:
            _held.add(self._descriptor)

    def release(self) -> None:
        """Let others in, if it was taken."""
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None


def _release_in_child() -> None:
    """Workers of a loader are forks: one that outlives a killed run would keep its folder locked."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def is_resumed(trainer: Trainer) -> bool:
    """Whether a fit continues the run of its folder: from a checkpoint of it, or with the Trainer that made it.

    Args:
        trainer: Not before ``on_fit_start``, when it knows its ``ckpt_path``.
    """
    file = trainer.ckpt_path
    return _is_in(file, trainer.default_root_dir) if file else trainer.global_step > 0


def refuse_started_folder(run_folder: str | Path, resumed: str | Path | None = None, table: bool = False) -> None:
    """Refuse a folder that holds a run already, unless that is the run that is resumed.

    Args:
        run_folder: Where a run is to write.
        resumed: The checkpoint that is resumed.
        table: Whether ``metrics.csv`` alone counts as a run.

    Raises:
        UserError: It holds another run.
    """
    folder = Path(run_folder)
    if resumed is not None and _is_in(resumed, folder):
        return
    saved = any(file.name != UNFINISHED for file in (folder / CHECKPOINTS).glob("*.ckpt"))
    if saved or (table and (folder / "metrics.csv").exists()):
        other = "" if resumed is None else f" {resumed} is not of it."
        raise UserError(
            f"{folder} holds a run already, which would be lost.{other} Resume it with `--ckpt_path last` (in Python: "
            f'ckpt_path="{folder / CHECKPOINTS / "last.ckpt"}"), or choose another folder with '
            "`--trainer.default_root_dir runs/NAME`."
        )


def refuse_everywhere(trainer: Trainer, check: Callable[[], object]) -> None:
    """Let the first process check something, and end every process if it refuses.

    Raises:
        UserError: It does.
    """
    fault = None
    if trainer.is_global_zero:
        try:
            check()
        except UserError as error:
            fault = str(error)
    fault = trainer.strategy.broadcast(fault)
    if fault is not None:
        raise UserError(fault)


@contextlib.contextmanager
def writing_to(run_folder: str | Path) -> Iterator[None]:
    """Report what the system has against a run folder.

    Raises:
        UserError: It cannot be written to.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"trainer.default_root_dir {run_folder} cannot be written to: {error.strerror}. Choose another folder."
        ) from error


def _is_in(file: str | Path, run_folder: str | Path) -> bool:
    folder = Path(file).resolve().parent
    owner = folder.parent if folder.name == CHECKPOINTS else None  # a run's folder may hold those of others
    run = Path(run_folder).resolve()
    return owner == run if owner else run in (folder, *folder.parents)


def _tables(trainer: Trainer) -> list[MetricsLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsLogger)]
