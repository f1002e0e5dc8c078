"""Checkpoints of the adapter to resume from, their files, and the adapter folder to use."""

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from qlora_lightning.callbacks.run_folder import is_resumed, locking, on_first_process, refuse_started_folder
from qlora_lightning.callbacks.stop_signals import StopSignals
from qlora_lightning.model.adapters.inject import copy_tensors, saved_tensors
from qlora_lightning.model.checkpoint.format import read_checkpoint, read_content
from qlora_lightning.model.checkpoint.resume import has_other_validation
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError, find_disk_fault
from qlora_lightning.support.files import ADAPTER_FOLDER, CHECKPOINTS, LAST, replacing
from qlora_lightning.support.settings import check_arguments, check_mode, natural_mode
from qlora_lightning.support.trainer import (
    callbacks_of,
    datamodule_of,
    find_callback,
    is_trial_run,
    say_once,
    validation_follows,
)
from qlora_lightning.support.values import check_setting

_UNFINISHED = "unfinished"  # the name of a checkpoint that is being written


class AdapterCheckpoint(Checkpoint):
    """Write ``checkpoints/last.ckpt``, the best checkpoints, and ``adapter/`` with the best adapter.

    Unlike Lightning's ``ModelCheckpoint``, it saves at validations *and* every n steps *and* every n minutes, and
    writes the PEFT folder. It saves at the end of an optimizer step, and only once if several saves are due.

    A run folder holds one run, which one process may train at a time. Every file is written under another name and then
    renamed, ``last.ckpt`` last. So a kill at any moment leaves a complete state. A resume completes a save that a kill
    cut short.

    Args:
        every_n_train_steps: Also write ``last.ckpt`` every N optimizer steps; ``None`` saves only at each validation,
            at the end and by ``every_minutes``.
        monitor: Metric that decides which adapter is best; without validation data, the last one is.
        save_top_k: Number of best checkpoints to keep besides ``last.ckpt``.
        mode: ``min`` or ``max``; ``None`` chooses it for the losses, perplexities, accuracies and matches that are
            logged here. Set it for a metric of your own.
        enabled: ``False`` writes nothing.
        every_minutes: Also write ``last.ckpt`` when this many minutes have passed since the last save; ``None`` ignores
            the time.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        monitor: str = "val_loss",
        save_top_k: int = 1,
        mode: Literal["min", "max"] | None = None,
        enabled: bool = True,
        every_minutes: float | None = 10,
    ) -> None:
        check_arguments("adapter_checkpoint", AdapterCheckpoint.__init__, locals())
        check_mode("adapter_checkpoint.mode", monitor, mode)
        mode = mode or natural_mode(monitor)
        expected = f"min or max, since a small or a large {monitor} may be good"
        check_setting("adapter_checkpoint.mode", mode, mode is not None or not enabled, expected)
        self.every_n_train_steps, self.every_minutes = every_n_train_steps, every_minutes
        self.monitor, self.mode, self.save_top_k = monitor, mode, save_top_k
        self.enabled = enabled
        self.best: list[tuple[float, str]] = []  # (monitored value, file name), the best first
        self._outranked: list[str] = []  # names of files that the save in progress deletes at its end
        self._value_before: Tensor | None = None
        self._saved_step = -1
        self._stops_later = False  # at the end of the open accumulation window
        self._saved_at = 0.0  # by the monotonic clock
        self._lock = contextlib.ExitStack()
        self._run_folder = ""

    @property
    def best_model_path(self) -> str:
        """File of the best checkpoint, as for ``trainer.test(ckpt_path="best")``; without a ranking the last one."""
        names = [*(name for _, name in self.best[:1]), LAST]
        files = [Path(self._run_folder) / CHECKPOINTS / name for name in names]
        return next((str(file) for file in files if file.is_file()), "")

    def read_best(self, run_folder: str | Path) -> dict[str, Tensor] | None:
        """Return the best adapter's tensors by the module's names, if there is a best one and its file exists."""
        file = Path(run_folder) / CHECKPOINTS / self.best[0][1] if self.best else None
        if file is None or not file.exists():
            return None
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        return tensors

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._lock.close()
        self._run_folder = trainer.default_root_dir
        if stage == "fit" and self._writes(trainer):
            on_first_process(trainer, lambda: self._lock.enter_context(locking(trainer.default_root_dir)))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        stored, ranked_by = checkpoint["callbacks"].get(self.state_key, {}), self.state_dict()["ranked_by"]
        differs = stored.get("ranked_by", ranked_by) != ranked_by
        if differs and trainer.state.fn == "fit":
            say_once(f"The best adapter was chosen by {stored['ranked_by']}: the ranking by {ranked_by} starts over.")
        if differs or has_other_validation(checkpoint, trainer):  # the ranking starts over
            checkpoint["callbacks"][self.state_key] = {**stored, "best": []}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        outranked, self._outranked = self._outranked, []
        if is_resumed(trainer):
            if self._writes(trainer) and trainer.ckpt_path:
                checkpoint, folder = Path(trainer.ckpt_path), Path(trainer.default_root_dir) / CHECKPOINTS
                on_first_process(trainer, lambda: _complete_save(checkpoint, folder, outranked))
            return
        self.best = []
        if self._writes(trainer):
            on_first_process(trainer, lambda: refuse_started_folder(trainer.default_root_dir, trainer.ckpt_path))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._lock.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._lock.close()
        if trainer.is_global_zero and find_disk_fault(exception):
            newest = _find_newest(Path(trainer.default_root_dir) / CHECKPOINTS)
            if newest is not None:
                say(f"{newest} is whole: when there is room, resume from it with `--ckpt_path {newest}`.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step  # nothing new yet, also after a resume
        self._saved_at = time.monotonic()
        self._stops_later = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        ends_step = not pl_module.window.batches
        # Lightning's Timer asks at any batch: the training stops at the end of a step
        self._stops_later = self._stops_later or trainer.should_stop
        trainer.should_stop = ends_step and self._stops_later
        if ends_step and not validation_follows(trainer) and self._is_due(trainer, pl_module):
            self._save(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._value_before = trainer.callback_metrics.get(self.monitor)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            module: Any = pl_module
            value = trainer.callback_metrics.get(self.monitor)
            value = None if value is self._value_before else value  # logged by an earlier validation
            self._save(trainer, pl_module, math.nan if value is None else float(value))
            # a callback may score answers, at later validations only
            may_follow = any(getattr(callback, "every_n_validations", None) for callback in callbacks_of(trainer))
            if value is None and self.enabled and not may_follow and not module.statistics.fault:
                metrics = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val_")))
                raise UserError(
                    f"adapter_checkpoint.monitor is {self.monitor!r}; a validation logs {metrics}, and scores only "
                    "with evaluation.every_n_validations.",
                    "adapter_checkpoint.monitor",
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save(trainer, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        minutes = self.every_minutes
        is_late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        pl_module.window.vote("late", is_late)

    def _is_due(self, trainer: Trainer, pl_module: Any) -> bool:
        """Whether to save at the end of a step that no validation follows; the same on all ranks."""
        every_n, signals = self.every_n_train_steps, find_callback(trainer, StopSignals)
        if (signals and signals.stopping) or _ends_training(trainer):
            return True
        return bool(every_n and trainer.global_step % every_n == 0) or pl_module.window.any_voted("late")

    def _writes(self, trainer: Trainer) -> bool:
        return self.enabled and not is_trial_run(trainer)

    def _save(self, trainer: Trainer, pl_module: Any, value: float = math.nan) -> None:
        """Write a checkpoint, and the adapter folder if ``value`` is the best so far or none is ranked."""
        if not self._writes(trainer):
            return
        name = f"step-{trainer.global_step:06d}.ckpt"
        self._outranked = [] if math.isnan(value) else self._rank(name, value)
        best_names = [file_name for _, file_name in self.best]
        content: Any = _collect_checkpoint(trainer)

        def write() -> None:
            run_folder, data = Path(trainer.default_root_dir), datamodule_of(trainer)
            if name in best_names[:1] or not best_names:
                tokenizer, stop_ids = getattr(data, "tokenizer", None), getattr(data, "stop_ids", ())
                pl_module.save_adapter(run_folder / ADAPTER_FOLDER, tokenizer, stop_ids)
            if name in best_names:
                _write_checkpoint(content, run_folder / CHECKPOINTS / name)
            _write_checkpoint(content, run_folder / CHECKPOINTS / LAST)
            for file_name in self._outranked:
                (run_folder / CHECKPOINTS / Path(file_name).name).unlink(missing_ok=True)

        on_first_process(trainer, write)
        self._outranked = []
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def _rank(self, name: str, value: float) -> list[str]:
        """Rank a checkpoint among the best; return the names of those that are no longer among them."""
        entries = [*(entry for entry in self.best if entry[1] != name), (value, name)]
        ranked = sorted(entries, key=lambda entry: entry[0], reverse=self.mode == "max")
        self.best = ranked[: self.save_top_k]
        return [file_name for _, file_name in ranked[self.save_top_k :]]

    def state_dict(self) -> dict[str, Any]:
        best = [[value, name] for value, name in self.best]
        return {"best": best, "outranked": self._outranked, "ranked_by": f"{self.mode or 'min'} {self.monitor}"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = [(float(value), str(name)) for value, name in state_dict["best"]]
        self._outranked = [str(name) for name in state_dict.get("outranked", ())]


def _ends_training(trainer: Trainer) -> bool:
    """Whether training ends with the batch that a Trainer has trained on."""
    epochs = trainer.current_epoch + trainer.is_last_batch  # completed after the batch
    may_stop = epochs >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    ends_epoch = trainer.is_last_batch and epochs == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or ends_epoch or (trainer.should_stop and may_stop)


@contextlib.contextmanager
def best_adapter(trainer: Trainer, module: Any) -> Iterator[None]:
    """Put a run's best adapter into the model, and restore the last one on exit; do nothing if there is no best."""
    callback = find_callback(trainer, AdapterCheckpoint)
    best_tensors = callback and callback.read_best(trainer.default_root_dir)
    if not best_tensors:
        yield
        return
    last_tensors = {name: tensor.detach().clone() for name, tensor in saved_tensors(module).items()}
    copy_tensors(module, best_tensors, "The best adapter")
    try:
        yield
    finally:
        copy_tensors(module, last_tensors, "The last adapter")


# ---- checkpoint files ------------------------------------------------------------------------------------------------


class _Collector(TorchCheckpointIO):
    """Keeps what Lightning would write: if the disk failed inside Lightning, the other ranks would wait forever."""

    content: dict[str, Any] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.content = checkpoint


def _collect_checkpoint(trainer: Trainer) -> dict[str, Any] | None:
    """Return the content of a checkpoint of the current state, on the first rank; every rank must call this."""
    collector = _Collector()
    original_io, trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io, collector
    try:
        trainer.save_checkpoint(LAST, weights_only=False)
    finally:
        trainer.strategy.checkpoint_io = original_io
    return collector.content


def _write_checkpoint(content: dict[str, Any], file: Path) -> None:
    with replacing(file, file.with_name(_UNFINISHED)) as stream:  # the next save replaces what a kill left
        torch.save(content, stream)


def _complete_save(checkpoint: Path, folder: Path, outranked: Sequence[str]) -> None:
    """Do what a kill has left undone of the save that wrote a checkpoint, from which a run resumes in its folder.

    ``outranked`` are the names that this checkpoint has. A file that came after it is the user's.
    """
    if not (folder / LAST).exists():
        with replacing(folder / LAST, folder / _UNFINISHED) as stream, checkpoint.open("rb") as source:
            shutil.copyfileobj(source, stream)
    (folder / _UNFINISHED).unlink(missing_ok=True)
    for file in (folder / Path(name).name for name in outranked):
        if file.exists() and file.stat().st_mtime_ns < checkpoint.stat().st_mtime_ns:
            file.unlink()


def find_checkpoint(run_folder: str | Path, name: str | None) -> str | None:
    """Return the file that ``--ckpt_path`` means: for ``last`` the run folder's newest, ``None`` if there is none.

    Raises:
        UserError: The file is missing, or not a complete checkpoint of this package.
    """
    if name is None:
        return None
    file = Path(run_folder) / CHECKPOINTS / LAST if name == "last" else Path(name)
    if name == "last" and not file.exists():  # a kill during the very first save may leave only ``step-….ckpt``
        newest = _find_newest(file.parent)
        return None if newest is None else str(newest)
    try:
        read_content(read_checkpoint(file, mmap=True), str(file))
    except UserError as error:
        newest = _find_newest(file.parent)
        remedy = f"There is no good one in {file.parent}; `--ckpt_path last` is the newest of the run folder."
        if newest is not None:
            remedy = f"Resume from the newest good one, with `--ckpt_path {newest}`."
        raise UserError(f"--ckpt_path {error} {remedy}", error.key) from error
    return str(file)


def _find_newest(folder: Path) -> Path | None:
    """Return the undamaged checkpoint with the most optimizer steps in a folder; of equals, ``last.ckpt``."""
    steps: dict[Path, int] = {}
    for file in folder.glob("*.ckpt"):
        with contextlib.suppress(UserError):
            checkpoint = read_checkpoint(file, mmap=True)
            read_content(checkpoint, str(file))
            steps[file] = checkpoint["global_step"]
    return max(steps, key=lambda file: (steps[file], file.name == LAST), default=None)
