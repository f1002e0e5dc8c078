"""Keeps a run folder to one run and one process, and writes the run's config, metrics and predictions into it."""

import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from qlora_lightning.model.adapters.identity import data_differences
from qlora_lightning.report.run_files import read_metric_rows
from qlora_lightning.sources.folders import find_adapter_folder, read_identity
from qlora_lightning.support import files
from qlora_lightning.support.console import count_of, say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import datamodule_of, gather_lists, is_trial_run, say_once

_LINE_KEY = "last_logged"  # of a checkpoint


class RunFolder(Callback):
    """Write ``config.yaml`` at the start of a fit, pass it to the loggers, and continue ``metrics.csv`` on a resume.

    A checkpoint has the line of its step, which a resume adds to ``metrics.csv`` if the run was killed before it was
    written. Other runs warn if their rows are others, or read otherwise, than those of the adapter's training.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config
        self._logged: dict[str, Any] = {}  # by the training, before this batch
        self._line: dict[str, float] | None = None  # of the checkpoint that is being restored

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_trial_run(trainer):
            return
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            files.remove_unfinished(folder)
            files.remove_unfinished(folder / files.ADAPTER_FOLDER)
        if self.config is None:
            return
        data = datamodule_of(trainer)
        seed = data.state_dict().get("seed") if data is not None else None
        if seed is not None:  # the checkpoint's, or torch's; in older checkpoints that is too large for seed_everything
            self.config["seed_everything"] = seed if seed < 2**32 else False
        model, module = self.config.get("model"), pl_module
        if isinstance(model, dict) and getattr(module, "adapter", None) is not None:  # its folder has the shape
            options: Any = getattr(module, "adapter_options", {})
            model |= {name: module.hparams[name] for name in options if name in model and name in module.hparams}
        if trainer.is_global_zero:
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            file = folder / files.CONFIG
            # of this run, if it was killed before it saved
            is_own = file.exists() and file.read_bytes() == text.encode(errors="backslashreplace")
            if file.exists() and not is_own and not is_resumed(trainer) and not files.name_earlier(file).exists():
                say(f"Kept as {files.set_aside(file).name}: {file}")  # it may be the user's own, with comments
            files.write_whole(file, text)
        for logger in trainer.loggers:
            try:
                logger.log_hyperparams(self.config)
            except Exception as fault:  # as MLflow, if a resumed run has other values: train on
                say(f"{type(logger).__name__} does not take the config: {type(fault).__name__}: {fault}")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._line = checkpoint.get(_LINE_KEY)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        line, self._line = self._line, None
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLogger):
                logger.cut(trainer.global_step, line)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._logged = dict(trainer.logged_metrics)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_LINE_KEY] = self._line_of_step(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLogger):
                logger.flush()

    def _line_of_step(self, trainer: Any, pl_module: Any) -> dict[str, float] | None:
        """Return the line of a step that ends, which Lightning gives to the loggers only after the hook that saves."""
        batches, every_n = trainer.fit_loop.epoch_loop.batch_progress.current, trainer.log_every_n_steps
        ends_step = batches.completed < batches.processed and not pl_module.window.batches
        if not ends_step or not every_n or (trainer.global_step % every_n and not trainer.should_stop):
            return None
        # at each access Lightning makes new tensors of what this epoch's training steps have logged
        values = {name: each for name, each in trainer.logged_metrics.items() if each is not self._logged.get(name)}
        return {**convert_tensors_to_scalars(values), "epoch": trainer.current_epoch}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        adapter: Any = getattr(pl_module, "adapter", None)
        if trainer.state.fn != "fit" and adapter is not None and not trainer.ckpt_path:
            warn_of_other_data(str(adapter), find_adapter_folder(adapter), datamodule_of(trainer))

    on_test_start = on_predict_start = on_validation_start


class MetricsLogger(Logger):
    """Write a line per logged step into a run folder. Lightning's ``CSVLogger`` deletes the file on a resume."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / files.METRICS
        self._columns: list[str] = []  # empty: the file has not been read yet

    @property
    def name(self) -> str:
        return ""  # the file is in the run folder itself

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write nothing: ``config.yaml`` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line; a new metric widens the table."""
        row = {"step": step, **metrics}
        if row.keys() <= set(self._columns):
            with self.file.open("a", newline="", encoding="utf-8") as handle:
                csv.DictWriter(handle, self._columns, lineterminator="\n").writerow(row)
        else:
            self._rewrite([*self._read(), row])

    @rank_zero_only
    def flush(self) -> None:
        """Wait until the disk has the lines."""
        if self.file.exists():
            files.flush(self.file)

    @rank_zero_only
    def cut(self, step: int, line: dict[str, float] | None = None) -> None:
        """Remove the lines from an optimizer step on, which a resumed run writes again; add that before it if missing.

        A step may have several lines: callbacks log too.
        """
        rows = self._read()
        if rows:
            self._rewrite([row for row in rows if int(row["step"]) < step])
        last_rows = [row for row in rows if int(row["step"]) == step - 1]
        if line is not None and not any(all(row.get(name) for name in line) for row in last_rows):
            self.log_metrics(line, step - 1)

    def _read(self) -> Sequence[dict[str, Any]]:
        """Return the lines of the file; none if it cannot be read, and it is kept under another name."""
        try:
            return read_metric_rows(self.file)
        except UserError as fault:
            say(f"{fault} It is kept as {files.set_aside(self.file).name}.")
            return []

    def _rewrite(self, rows: Sequence[dict[str, Any]]) -> None:
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.write_whole(self.file, text.getvalue())


class PredictionWriter(Callback):
    """Write ``predictions.jsonl`` into the run folder: each row, its own answer if it has one, and the model's.

    Each process appends its answers to its own file as they come, which a stopped run leaves. At the end the first
    process writes those of all processes, in the order of the rows.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        prefix = f"{trainer.global_rank}-" if trainer.global_rank else ""
        self._unfinished = Path(trainer.default_root_dir) / f"{prefix}{files.UNFINISHED_PREDICTIONS}"
        self._lines: list[dict[str, Any]] = []
        files.set_aside(self._unfinished)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        tokenizer: Any = datamodule_of(trainer).tokenizer
        lines = [
            {
                "row": prompt.row_id,
                "prediction": tokenizer.decode(answer),
                "reference": prompt.reference,
                "input": prompt.values,
                "stopped": len(answer) < batch["max_new_tokens"],  # by itself, not cut
            }
            for answer, prompt in zip(outputs, batch["prompts"], strict=True)
        ]
        self._lines += lines
        files.append_json_lines(self._unfinished, lines)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lines = sorted(gather_lists(trainer, self._lines), key=lambda line: line["row"])
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / files.PREDICTIONS
            files.set_aside(file)  # hours of another predict
            files.write_whole(file, files.format_json_lines(lines))
            say(f"{count_of(len(lines), 'prediction')}: {file}")
        files.set_aside(self._unfinished).unlink(missing_ok=True)


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
                f"{folder} is a link, and a run does not write through links: remove it, or choose a run folder "
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
        last = str(folder / files.CHECKPOINTS / files.LAST)
        resume = f"resume it with `--ckpt_path last` (in Python ckpt_path={last!r}), or " if has_checkpoint else ""
        raise UserError(
            f"{folder} holds a run already, which would be lost: {resume}choose another folder with "
            "`--trainer.default_root_dir runs/NAME`.",
            "run_folder.has_a_run",
        )


def on_first_process(trainer: Trainer, act: Callable[[], object]) -> None:
    """Call ``act`` in the first process; if it fails, raise in all: the others would wait for it forever."""
    fault: Exception | None = None
    if trainer.is_global_zero:
        try:
            act()
        except Exception as error:
            fault = error
    message = trainer.strategy.broadcast(None if fault is None else str(fault))
    if fault is not None:
        raise fault
    if message is not None:
        raise UserError(message)


def _is_in(file: str | Path, run_folder: str | Path) -> bool:
    folder = Path(file).resolve().parent
    owner = folder.parent if folder.name == files.CHECKPOINTS else None  # a run folder may hold other run folders
    run = Path(run_folder).resolve()
    return owner == run if owner else run in (folder, *folder.parents)
