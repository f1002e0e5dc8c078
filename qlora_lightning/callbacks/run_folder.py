"""Keeps a run folder to one run and one process, and writes the run's config into it."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.callbacks.checkpoint_file import reporting_disk_faults
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.model.adapters.identity import data_differences
from qlora_lightning.sources.folders import find_adapter_folder, read_identity
from qlora_lightning.support import files
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import datamodule_of, is_trial_run, say_once


class RunFolder(Callback):
    """Write ``config.yaml`` at the start of a fit, pass it to the loggers, and continue ``metrics.csv`` on a resume.

    Other runs warn if their rows are others, or read otherwise, than those of the adapter's training.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_trial_run(trainer):
            return
        data = datamodule_of(trainer)
        seed = data.state_dict().get("seed") if data is not None else None
        if seed is not None:  # the checkpoint's, or torch's; in older checkpoints that is too large for seed_everything
            self.config["seed_everything"] = seed if seed < 2**32 else False
        if trainer.is_global_zero:
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            file = Path(trainer.default_root_dir) / files.CONFIG
            with reporting_disk_faults(trainer.default_root_dir):
                if file.exists() and not is_resumed(trainer) and not files.name_earlier(file).exists():
                    say(f"Kept as {files.set_aside(file).name}: {file}")  # it may be the user's own, with comments
                files.write_whole(file, text)
        for logger in trainer.loggers:
            try:
                logger.log_hyperparams(self.config)
            except Exception as fault:  # as MLflow, if a resumed run has other values: train on
                say(f"{type(logger).__name__} does not take the config: {type(fault).__name__}: {fault}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLogger):
                logger.cut(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        adapter: Any = getattr(pl_module, "adapter", None)
        if trainer.state.fn != "fit" and adapter is not None and not trainer.ckpt_path:
            warn_of_other_data(str(adapter), find_adapter_folder(adapter), datamodule_of(trainer))

    on_test_start = on_predict_start = on_validation_start


def warn_of_other_data(name: str, folder: Path, data: Any) -> None:
    """Warn of settings that give other prompts, or other held-out rows, than an adapter's training had."""
    stored, current = read_identity(folder).get("data") or {}, getattr(data, "identity", {})
    differences = data_differences(stored, current)
    if getattr(data, "val_fraction", None) is not None and {"train", "val"} & differences.keys():
        say_once(
            f"Warning: the rows that are held out now are not those of {name}'s training, which may have had them: "
            "pass the --seed_everything and the data of its run."
        )
    keys = [f"data.{key}" for key in ("tokenizer", "chat_template") if key in differences]
    if "settings" in stored and stored["settings"].get("system") != (current.get("settings") or {}).get("system"):
        keys.append("data.system")
    if keys:
        say_once(f"Warning: {name} was trained with another {' and '.join(keys)}, so its prompts here are new to it.")


@contextlib.contextmanager
def locking(run_folder: str | Path) -> Iterator[None]:
    """Hold an exclusive lock on a run's checkpoint folder itself: it leaves no file, and a kill releases it too.

    Without effect if the system (Windows) or the file system (NFS) has no such locks.
    """
    folder, adapter = Path(run_folder) / files.CHECKPOINTS, Path(run_folder) / files.ADAPTER_FOLDER
    refuse_links(folder, adapter, *adapter.glob("*/"))
    with reporting_disk_faults(run_folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another process trains in {run_folder}: wait until it has ended, or choose another folder with "
                "`--trainer.default_root_dir runs/NAME`.",
                "run_folder.in_use",
            ) from error
        except OSError:  # no such locks
            pass
        yield
    finally:
        os.close(descriptor)


def refuse_links(*folders: Path) -> None:
    """Reject links instead of folders that a run writes into: one from elsewhere may lead to any folder of the user.

    The run folder itself, which the user names, may be one.
    """
    for folder in folders:
        if folder.is_symlink():
            raise UserError(
                f"{folder} is a link, and a run writes into no folder behind one: remove it, or choose a run folder "
                "on the other disk with `--trainer.default_root_dir PATH`.",
                "run_folder.link",
            )


def is_resumed(trainer: Trainer) -> bool:
    """Whether a fit continues the run of its folder: from its checkpoint, or with the Trainer that began it."""
    file = trainer.ckpt_path  # set from on_fit_start on
    return _is_in(file, trainer.default_root_dir) if file else trainer.global_step > 0


def refuse_started_folder(run_folder: str | Path, resumed: str | Path | None = None, table: bool = False) -> None:
    """Reject a folder that already holds a run, unless ``resumed`` is a checkpoint of it.

    With ``table``, ``metrics.csv`` alone counts as a run.
    """
    folder = Path(run_folder)
    if resumed is not None and _is_in(resumed, folder):
        return
    has_checkpoint = any((folder / files.CHECKPOINTS).glob("*.ckpt"))
    if has_checkpoint or (table and (folder / files.METRICS).exists()):
        other = "" if resumed is None else f" {resumed} is not of it."
        remedy = "Resume it with `--ckpt_path last`, or choose" if has_checkpoint else "Choose"
        raise UserError(
            f"{folder} holds a run already, which would be lost.{other} {remedy} another folder with "
            "`--trainer.default_root_dir runs/NAME`.",
            "run_folder.has_a_run",
        )


def refuse_everywhere(trainer: Trainer, act: Callable[[], object]) -> None:
    """Call ``act`` in the first process, and raise its ``UserError`` in all: the others would wait for it forever."""
    fault = None
    if trainer.is_global_zero:
        try:
            act()
        except UserError as error:
            fault = str(error), error.key
    fault = trainer.strategy.broadcast(fault)
    if fault is not None:
        raise UserError(*fault)


def _is_in(file: str | Path, run_folder: str | Path) -> bool:
    folder = Path(file).resolve().parent
    owner = folder.parent if folder.name == files.CHECKPOINTS else None  # a run folder may hold other run folders
    run = Path(run_folder).resolve()
    return owner == run if owner else run in (folder, *folder.parents)
