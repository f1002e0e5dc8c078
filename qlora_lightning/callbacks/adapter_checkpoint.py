"""Checkpoints of the adapter to resume from, and the adapter folder to use."""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import rich
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from rich.markup import escape
from torch import Tensor

from qlora_lightning.callbacks.adapter_ema import holding_average
from qlora_lightning.callbacks.checkpoint_file import (
    CHECKPOINTS,
    UNFINISHED,
    SaveFaults,
    clear_remains,
    find_newest,
    write_checkpoint,
)
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.callbacks.run_folder import FolderLock, is_resumed, refuse_everywhere, refuse_started_folder
from qlora_lightning.callbacks.stop_signals import StopSignals
from qlora_lightning.model.adapters.folder import loading_snippet
from qlora_lightning.model.adapters.lora import copy_tensors, trainable_tensors
from qlora_lightning.model.checkpoint.loops import ends_training, validation_follows
from qlora_lightning.model.checkpoint.resume import has_other_validation
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import flush, put_in_place
from qlora_lightning.support.trainer import callbacks_of, is_trial_run


class AdapterCheckpoint(Checkpoint):
    """Write ``checkpoints/last.ckpt``, the best checkpoints, and ``adapter/`` with the best adapter.

    What Lightning's ``ModelCheckpoint`` does not do: save at validations *and* every n steps *and* every n minutes,
    once if several are due, and write the PEFT folder. All of it is under ``trainer.default_root_dir``, which is kept
    to one run, and to one process that trains at a time.

    Args:
        every_n_train_steps: Also write ``last.ckpt`` every so many optimizer steps; ``None``: at each validation, at
            the end and ``every_minutes``.
        monitor: Metric that says which adapter is best; without validation data the last is.
        save_top_k: How many best checkpoints to keep besides ``last.ckpt``.
        mode: Whether a small or a large ``monitor`` is good.
        enabled: ``False`` writes nothing.
        every_minutes: Also write ``last.ckpt`` after the optimizer step that ends so many minutes after the last save;
            ``None``: never for the time alone.
    """

    saves_when_stopped = True  # by StopSignals

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        monitor: str = "val_loss",
        save_top_k: int = 1,
        mode: Literal["min", "max"] = "min",
        enabled: bool = True,
        every_minutes: float | None = 10,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise UserError(f"adapter_checkpoint.every_n_train_steps is {every_n_train_steps}: expected 1 or more.")
        if every_minutes is not None and not every_minutes > 0:
            raise UserError(f"adapter_checkpoint.every_minutes is {every_minutes:g}: expected more than 0, or null.")
        if save_top_k < 0:
            raise UserError(f"adapter_checkpoint.save_top_k is {save_top_k}: expected 0 or more.")
        self.every_n_train_steps = every_n_train_steps
        self.monitor = monitor
        self.save_top_k = save_top_k
        self.mode = mode
        self.enabled = enabled
        self.every_minutes = every_minutes
        self.best: list[tuple[float, str]] = []  # (monitored value, file name), the best first
        self._best_tensors: dict[str, Tensor] | None = None  # of the best adapter, if this process trained it
        self._has_other_validation = False  # than the resumed checkpoint
        self._saved_step = self._seen_step = -1
        self._saved_at = 0.0  # by a clock that no change of the time moves
        self._written: Path | None = None  # a checkpoint that waits to become last.ckpt
        self._dropped: list[str] = []  # names to prune when it has
        self._lock = FolderLock()

    @staticmethod
    def checkpoint_folder(run_folder: str | Path) -> Path:
        """Return the folder of a run's checkpoints."""
        return Path(run_folder) / CHECKPOINTS

    @staticmethod
    def adapter_folder(run_folder: str | Path) -> Path:
        """Return the folder of a run's best adapter."""
        return Path(run_folder) / "adapter"

    def read_best(self, run_folder: str | Path) -> dict[str, Tensor] | None:
        """Return the best adapter's tensors by the module's names, if there is a best and its file was kept."""
        if self._best_tensors is not None or not self.best:
            return self._best_tensors
        file = self.checkpoint_folder(run_folder) / self.best[0][1]
        if not file.exists():
            return None
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        return tensors

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._has_other_validation = False
        if stage == "fit" and self._writes(trainer):
            refuse_everywhere(trainer, lambda: self._lock.take(trainer.default_root_dir))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._has_other_validation = has_other_validation(checkpoint, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_other_validation and is_resumed(trainer):
            self._reset_ranking(trainer, f"The validation samples are not those of {trainer.ckpt_path}")
        if not trainer.enable_validation:
            self._reset_ranking(trainer, "Nothing is validated any more")
        if not is_resumed(trainer):
            self._reset_ranking(trainer, f"{trainer.ckpt_path} is of another run folder")
            if self._writes(trainer):
                refuse_everywhere(trainer, lambda: refuse_started_folder(trainer.default_root_dir, trainer.ckpt_path))
        if self._writes(trainer) and trainer.is_global_zero:
            self._clear_remains(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._lock.release()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Some log only at later validations, and say so: see Evaluation.logs.
        later = any(each.logs(self.monitor) for each in callbacks_of(trainer) if hasattr(each, "logs"))
        known = later or self.monitor in trainer.callback_metrics
        if self.enabled and not known and trainer.is_global_zero:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            say(
                f"adapter_checkpoint.monitor is {self.monitor!r}, which the sanity check did not log (it logged "
                f"{logged}): unless the first validation does, that will end the run."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = self._seen_step = trainer.global_step  # nothing new yet, also after a resume
        self._saved_at = time.monotonic()
        self._written = None
        self._mend_adapter(trainer, pl_module)
        if self._stop(trainer):
            self._leave(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._commit(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every, step = self.every_n_train_steps, trainer.global_step
        step_ends, self._seen_step = step != self._seen_step, step
        if validation_follows(trainer, batch_idx):
            return  # it saves
        asked = step != self._saved_step and ((every and step % every == 0) or ends_training(trainer))
        if asked or self._stop(trainer) or (step_ends and self._is_time(trainer)):
            self._write(trainer, pl_module)  # it counts when the line of this step in metrics.csv is written too

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._commit(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_inside_validation(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._stop_inside_validation(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None and self.enabled:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val_")))
            raise UserError(
                f"adapter_checkpoint.monitor is {self.monitor!r}, which no validation logs: it logs {known}."
            )
        self._write(trainer, pl_module, None if value is None else float(value))
        self._commit(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._write(trainer, pl_module)
        self._commit(trainer, leaves=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:  # nothing was left to train
            self._mend_adapter(trainer, pl_module)

    def _is_time(self, trainer: Trainer) -> bool:
        """Whether ``every_minutes`` have passed since the last save by any rank's clock; every rank must call it."""
        if self.every_minutes is None or not self._writes(trainer):
            return False
        over = time.monotonic() - self._saved_at >= 60 * self.every_minutes
        return trainer.strategy.reduce_boolean_decision(over, all=False)

    def _stop_inside_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # From behind the last step Lightning would not resume, nor run the validation: it may end.
        ended = trainer.global_step == trainer.max_steps
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not ended and self._stop(trainer):
            self._write(trainer, pl_module)
            self._commit(trainer)

    def _stop(self, trainer: Trainer) -> StopSignals | None:
        """Return the callback that has been asked to stop, if it has."""
        return next(
            (found for found in callbacks_of(trainer) if isinstance(found, StopSignals) and found.stopping), None
        )

    def _leave(self, trainer: Trainer) -> None:
        stop, last = self._stop(trainer), self.checkpoint_folder(trainer.default_root_dir) / "last.ckpt"
        if stop is not None:
            stop.leave(trainer, last if self._writes(trainer) and last.exists() else None)

    def _writes(self, trainer: Trainer) -> bool:
        return self.enabled and not is_trial_run(trainer)

    def _write(self, trainer: Trainer, pl_module: LightningModule, value: float | None = None) -> None:
        """Write a checkpoint beside ``last.ckpt``, and under its own name and as adapter folder if it is to be kept."""
        if self._writes(trainer):
            with holding_average(trainer, pl_module):
                self._write_held(trainer, pl_module, value)

    def _write_held(self, trainer: Trainer, pl_module: LightningModule, value: float | None) -> None:
        run_folder, name = trainer.default_root_dir, f"step-{trainer.global_step:06d}.ckpt"
        folder = self.checkpoint_folder(run_folder)
        self._dropped += self._rank(name, value)
        if self._is_best(name):
            self._best_tensors = {key: tensor.clone() for key, tensor in pl_module.state_dict().items()}
        unfinished, faults = folder / UNFINISHED, SaveFaults()
        write_checkpoint(trainer, unfinished, faults)
        if trainer.is_global_zero and not faults.first:
            with faults.noting(unfinished):
                flush(unfinished)
            if self.save_top_k and any(kept == name for _, kept in self.best) and not faults.first:
                copy = folder / f"{name}.unfinished"  # no hard link: damage to one file would be damage to both
                with faults.noting(folder / name):
                    shutil.copyfile(unfinished, copy)
                    put_in_place(copy, folder / name)
            if (self._is_best(name) or not self.best) and not faults.first:
                with faults.noting(self.adapter_folder(run_folder)):
                    self._write_adapter(trainer, pl_module)
        self._report_fault(trainer, faults)
        self._saved_step, self._saved_at, self._written = trainer.global_step, time.monotonic(), unfinished

    def _commit(self, trainer: Trainer, leaves: bool = True) -> None:
        """Let what was written become ``last.ckpt``, prune what it replaces, and leave if that was asked for."""
        unfinished, self._written, faults = self._written, None, SaveFaults()
        if unfinished is not None:
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    if isinstance(logger, MetricsLogger):
                        logger.flush()  # a checkpoint counts on the lines before it
                with faults.noting(unfinished.with_name("last.ckpt")):
                    put_in_place(unfinished, unfinished.with_name("last.ckpt"))
                    self._prune(unfinished.parent)
            self._report_fault(trainer, faults)
        if leaves and (unfinished is not None or not self._writes(trainer)):
            self._leave(trainer)

    def _report_fault(self, trainer: Trainer, faults: SaveFaults) -> None:
        """End the run on every rank if the first could not save.

        Raises:
            UserError: It could not.
        """
        refuse_everywhere(trainer, lambda: self._refuse(trainer, faults))

    def _refuse(self, trainer: Trainer, faults: SaveFaults) -> None:
        if faults.first is None:
            return
        self._clear_remains(trainer)
        whole = find_newest(self.checkpoint_folder(trainer.default_root_dir))
        state = "Nothing had been saved before: start again when that is mended."
        if whole is not None:
            name = "last" if whole.stem == "last" else whole
            state = f"{whole} is whole: when that is mended, resume from it with `--ckpt_path {name}`."
        raise UserError(f"{faults.first} {state}")

    def _clear_remains(self, trainer: Trainer) -> None:
        root = trainer.default_root_dir
        clear_remains(self.checkpoint_folder(root), self.adapter_folder(root))

    def _prune(self, folder: Path) -> None:
        kept = {name for _, name in self.best}
        for old in self._dropped:
            if old not in kept:
                (folder / Path(old).name).unlink(missing_ok=True)
        self._dropped = []

    def _rank(self, name: str, value: float | None) -> list[str]:
        """Put a checkpoint in its place among the best, and give the names that are no longer among them."""
        if value is None or math.isnan(value):
            return []
        entries = [*[entry for entry in self.best if entry[1] != name], (value, name)]
        entries.sort(key=lambda entry: entry[0], reverse=self.mode == "max")
        keep = max(self.save_top_k, 1)  # the best is remembered even if no file of it is kept
        self.best, dropped = entries[:keep], entries[keep:]
        return [name for _, name in dropped]

    def _reset_ranking(self, trainer: Trainer, why: str) -> None:
        """Forget a ranking that does not hold here, and report where the best so far is."""
        if self.best and trainer.ckpt_path and self._writes(trainer) and trainer.is_global_zero:
            value, name = self.best[0]
            file = Path(trainer.ckpt_path).with_name(name)
            say(
                f"{why}: the ranking of checkpoints starts over here. The best so far, with {self.monitor} "
                f"{value:.4g}, {f'is {file}' if file.exists() else f'was {name}'}."
            )
        self.best, self._dropped, self._best_tensors = [], [], None

    def _is_best(self, name: str) -> bool:
        return bool(self.best) and self.best[0][1] == name

    def _mend_adapter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter again if the best and newest checkpoint is resumed: a fault may have come between them."""
        resumed = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        if resumed is None or not self._writes(trainer) or not self._is_best(resumed.name):
            return
        if trainer.strategy.broadcast(find_newest(resumed.parent) == resumed):
            faults = SaveFaults()
            with holding_average(trainer, pl_module), faults.noting(self.adapter_folder(trainer.default_root_dir)):
                if trainer.is_global_zero:
                    self._write_adapter(trainer, pl_module)
            self._report_fault(trainer, faults)

    def _write_adapter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write: Any = getattr(pl_module, "save_adapter", None)
        if write is not None:
            data = getattr(trainer, "datamodule", None)
            tokenizer, stop_ids = getattr(data, "tokenizer", None), getattr(data, "stop_ids", ())
            write(self.adapter_folder(trainer.default_root_dir), tokenizer, stop_ids)

    def state_dict(self) -> dict[str, Any]:
        """Return the best values and names, so that a resumed run continues the ranking."""
        return {"best": [[value, name] for value, name in self.best], "dropped": list(self._dropped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the ranking of the run that is resumed."""
        self.best = [(float(value), str(name)) for value, name in state_dict["best"]]
        self._dropped = [str(name) for name in state_dict.get("dropped", [])]  # a kill may have kept them
        self._best_tensors = None


@contextlib.contextmanager
def best_adapter(trainer: Trainer, module: Any) -> Iterator[None]:
    """Hold the best adapter of a run in the model, and put the last one back; nothing if no best is known."""
    writer = next((each for each in callbacks_of(trainer) if isinstance(each, AdapterCheckpoint)), None)
    best = writer and writer.read_best(trainer.default_root_dir)
    if not best:
        yield
        return
    last = {name: tensor.detach().clone() for name, tensor in trainable_tensors(module).items()}
    copy_tensors(module, best, "The best adapter")
    try:
        yield
    finally:
        copy_tensors(module, last, "The last adapter")


class LoadingLines(Callback):
    """Print the three lines that load the run's adapter folder without this package, as the last lines of a fit."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # after every on_fit_end
        folder = AdapterCheckpoint.adapter_folder(trainer.default_root_dir)
        identity = folder / "qlora_lightning.json"
        if stage == "fit" and trainer.is_global_zero and not is_trial_run(trainer) and identity.exists():
            rich.print(f"\nAdapter: [bold]{escape(str(folder))}[/bold]. To load it with plain PEFT:\n")
            # Not read_identity, which is for who builds on it: a build_model may have made another kind than LoRA.
            print(loading_snippet(folder, json.loads(identity.read_text(encoding="utf-8"))))
