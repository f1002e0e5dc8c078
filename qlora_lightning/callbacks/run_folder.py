"""Keeps a run folder to one run: nothing is started over, and what is resumed goes on in the same files."""

from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.errors import UserError
from qlora_lightning.model.resume import KEY, read_content


class RunFolder(Callback):
    """Write ``config.yaml`` at the start of a fit, and cut ``metrics.csv`` at the step from which a run goes on.

    Args:
        config: The whole config of the run, in the form that ``--config`` reads.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self._inside_window = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            folder = Path(trainer.default_root_dir)
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            unfinished = folder / "config.yaml.unfinished"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                unfinished.write_text(text, encoding="utf-8")
                unfinished.replace(folder / "config.yaml")
            except OSError as error:
                raise UserError(
                    f"trainer.default_root_dir {folder} cannot be written to: {error.strerror}. Name another folder."
                ) from error

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._inside_window = bool(checkpoint.get(KEY, {}).get("window"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLogger):
                logger.cut(trainer.global_step, keep_validation=self._inside_window)


def refuse_started_folder(folder: str | Path) -> None:
    """Refuse a folder that holds a run already.

    Raises:
        UserError: It does.
    """
    folder = Path(folder)
    if (folder / "metrics.csv").exists() or any(AdapterCheckpoint.checkpoint_folder(folder).glob("*.ckpt")):
        raise UserError(
            f"{folder} holds a run already, which would be lost. Go on with it by `--ckpt_path last`, or name another "
            "folder by `--trainer.default_root_dir runs/NAME`."
        )


def find_checkpoint(folder: str | Path, name: str | None) -> str | None:
    """Turn ``--ckpt_path last`` into the run folder's last checkpoint; nothing where there is none yet.

    Raises:
        UserError: Another name, and no such file.
    """
    if name is None:
        return None
    if name == "last":
        file = AdapterCheckpoint.checkpoint_folder(folder) / "last.ckpt"
        return str(file) if file.exists() else None
    return name


def check_checkpoint(file: str | Path) -> None:
    """Refuse a file that is no whole checkpoint of ours, before anything is loaded for it.

    Raises:
        UserError: It is not there, cut off, or foreign.
    """
    if not Path(file).is_file():
        raise UserError(f"--ckpt_path {file}: there is no such file. Expected a .ckpt file, or `last`.")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has no exception of its own for a file that it cannot read
        raise UserError(f"--ckpt_path {file} is no checkpoint, or it is cut off: {type(error).__name__}.") from error
    read_content(checkpoint if isinstance(checkpoint, dict) else {}, f"--ckpt_path {file}")
