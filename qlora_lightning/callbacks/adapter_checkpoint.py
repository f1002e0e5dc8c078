"""Checkpoints of the adapter to resume from, and the adapter folder to use."""

import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from qlora_lightning.errors import UserError


class AdapterCheckpoint(Checkpoint):
    """Write ``checkpoints/last.ckpt``, the best checkpoints, and ``adapter/`` with the best adapter.

    What Lightning's ``ModelCheckpoint`` does not do: save at validations *and* every n steps, never where a resume
    would skip a validation that is due, and write the PEFT folder. It all lies under ``trainer.default_root_dir``.

    Args:
        every_n_train_steps: Also write ``last.ckpt`` every so many optimizer steps; ``None``: at each validation and
            at the end.
        monitor: Metric that says which adapter is best; without validation data the last is.
        save_top_k: How many best checkpoints to keep besides ``last.ckpt``.
        mode: Whether a small or a large ``monitor`` is good.
        enabled: ``False`` writes nothing.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        monitor: str = "val_loss",
        save_top_k: int = 1,
        mode: Literal["min", "max"] = "min",
        enabled: bool = True,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise UserError(f"adapter_checkpoint.every_n_train_steps is {every_n_train_steps}: expected 1 or more.")
        if save_top_k < 0:
            raise UserError(f"adapter_checkpoint.save_top_k is {save_top_k}: expected 0 or more.")
        self.every_n_train_steps = every_n_train_steps
        self.monitor = monitor
        self.save_top_k = save_top_k
        self.mode = mode
        self.enabled = enabled
        self.best: list[tuple[float, str]] = []  # (monitored value, file name), the best first
        self._best_tensors: dict[str, Tensor] | None = None  # of the best adapter, if this process trained it
        self._saved_step = -1

    @staticmethod
    def checkpoint_folder(run_folder: str | Path) -> Path:
        """Where the checkpoints of a run lie."""
        return Path(run_folder) / "checkpoints"

    @staticmethod
    def adapter_folder(run_folder: str | Path) -> Path:
        """Where the best adapter of a run lies."""
        return Path(run_folder) / "adapter"

    def read_best(self, run_folder: str | Path) -> dict[str, Tensor] | None:
        """Give the best adapter's tensors by the module's names, if there is a best and it was kept."""
        if self._best_tensors is not None or not self.best:
            return self._best_tensors
        file = self.checkpoint_folder(run_folder) / self.best[0][1]
        if not file.exists():
            return None
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        return tensors

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step  # nothing new yet, also after a resume

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every, step = self.every_n_train_steps, trainer.global_step
        if every and step % every == 0 and step != self._saved_step and not _validation_follows(trainer, batch_idx):
            self._save(trainer, pl_module, value=None)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val_")))
            raise UserError(
                f"adapter_checkpoint.monitor is {self.monitor!r}, which no validation logs: it logs {known}."
            )
        self._save(trainer, pl_module, value=float(value))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save(trainer, pl_module, value=None)

    def _save(self, trainer: Trainer, pl_module: LightningModule, value: float | None) -> None:
        """Write ``last.ckpt`` beside and rename it, then keep it under its own name if it is among the best."""
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            return
        folder = self.checkpoint_folder(trainer.default_root_dir)
        name = f"step-{trainer.global_step:06d}.ckpt"
        dropped = self._rank(name, value)
        if self._is_best(name):
            self._best_tensors = {key: tensor.clone() for key, tensor in pl_module.state_dict().items()}
        unfinished, last = folder / "unfinished.ckpt", folder / "last.ckpt"
        trainer.save_checkpoint(unfinished, weights_only=False)  # every rank takes part; the first writes
        if trainer.is_global_zero:
            _flush(unfinished)
            if self.save_top_k and any(kept == name for _, kept in self.best):
                _link(unfinished, folder / name)
            if self._is_best(name) or not self.best:
                self._write_adapter(trainer, pl_module)
            os.replace(unfinished, last)  # last of all: it says that all the others are there
            for old in dropped:
                (folder / old).unlink(missing_ok=True)
        self._saved_step = trainer.global_step
        trainer.strategy.barrier("adapter_checkpoint")

    def _rank(self, name: str, value: float | None) -> list[str]:
        """Put a checkpoint in its place among the best, and give the names that are no longer among them."""
        if value is None or math.isnan(value):
            return []
        entries = [*[entry for entry in self.best if entry[1] != name], (value, name)]
        entries.sort(key=lambda entry: entry[0], reverse=self.mode == "max")
        keep = max(self.save_top_k, 1)  # the best is remembered even where no file of it is kept
        self.best, dropped = entries[:keep], entries[keep:]
        return [name for _, name in dropped]

    def _is_best(self, name: str) -> bool:
        return bool(self.best) and self.best[0][1] == name

    def _write_adapter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write: Any = getattr(pl_module, "save_adapter", None)
        if write is not None:
            data = getattr(trainer, "datamodule", None)
            tokenizer, stop_ids = getattr(data, "tokenizer", None), getattr(data, "stop_ids", ())
            write(self.adapter_folder(trainer.default_root_dir), tokenizer, stop_ids)

    def state_dict(self) -> dict[str, Any]:
        """Give the best values and names, so that a resumed run goes on ranking."""
        return {"best": [[value, name] for value, name in self.best]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the ranking of the run that is resumed."""
        self.best = [(float(value), str(name)) for value, name in state_dict["best"]]


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation is due after this batch: a checkpoint from before it would make a resume skip it."""
    if not trainer.enable_validation:
        return False
    every_epochs = trainer.check_val_every_n_epoch
    if every_epochs is not None and (trainer.current_epoch + 1) % every_epochs:
        return False
    interval = trainer.val_check_batch
    if interval is None or interval == float("inf"):
        return bool(trainer.is_last_batch)
    batches = trainer.fit_loop.total_batch_idx if every_epochs is None else batch_idx
    return (batches + 1) % int(interval) == 0


def _link(source: Path, target: Path) -> None:
    """Let two names share one file, or copy it where the file system knows no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
