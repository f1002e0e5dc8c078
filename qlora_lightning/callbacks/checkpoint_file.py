"""Checkpoint files: collected and written, found by ``--ckpt_path``, rejected if damaged."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qlora_lightning.model.checkpoint.format import read_checkpoint, read_content
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import CHECKPOINTS, put_in_place

LAST = "last.ckpt"


class _Collector(TorchCheckpointIO):
    """Keeps what Lightning would write: if the disk failed inside Lightning, the other ranks would wait forever."""

    content: dict[str, Any] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.content = checkpoint


def collect_checkpoint(trainer: Trainer) -> dict[str, Any] | None:
    """Return the content of a checkpoint of the current state, on the first rank; every rank must call this."""
    collector = _Collector()
    original_io, trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io, collector
    try:
        trainer.save_checkpoint(LAST, weights_only=False)
    finally:
        trainer.strategy.checkpoint_io = original_io
    return collector.content


def write_checkpoint(content: dict[str, Any], file: Path) -> None:
    """Write a checkpoint under another name and rename it: a kill or a full disk leaves the old file or the new one."""
    unfinished = file.with_name("unfinished")  # always this name: the next save replaces what a kill left
    unfinished.unlink(missing_ok=True)  # it may be a link to another file
    try:
        with unfinished.open("xb") as handle:
            torch.save(content, handle)
        put_in_place(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def reporting_disk_faults(run_folder: str | Path) -> Iterator[None]:
    """Report why the disk rejects a write and from which checkpoint to resume; let other errors pass."""
    try:
        yield
    except Exception as error:
        fault: BaseException | None = error
        while fault is not None and not isinstance(fault, OSError):  # torch wraps it in a RuntimeError
            fault = fault.__cause__ or fault.__context__
        if fault is None:
            raise
        checkpoint = find_newest(Path(run_folder) / CHECKPOINTS)
        remedy = "Make room, or choose another folder."
        if checkpoint is not None:
            remedy = f"{checkpoint} is whole: when that is solved, resume from it with `--ckpt_path {checkpoint}`."
        reason = fault.strerror or str(fault)
        raise UserError(
            f"trainer.default_root_dir {run_folder} cannot be written to: {reason}. {remedy}", "run_folder.disk"
        ) from error


def find_checkpoint(run_folder: str | Path, name: str | None) -> str | None:
    """Return the file that ``--ckpt_path`` means: for ``last`` the run folder's newest, ``None`` if there is none."""
    if name != "last":
        return name
    file = Path(run_folder) / CHECKPOINTS / LAST
    if file.exists():
        check_checkpoint(file)
        return str(file)
    newest = find_newest(file.parent)  # a kill during the very first save may leave only ``step-….ckpt``
    return None if newest is None else str(newest)


def find_newest(folder: Path) -> Path | None:
    """Return the undamaged checkpoint with the most optimizer steps in a folder; of equals, ``last.ckpt``."""
    steps: dict[Path, int] = {}
    for file in folder.glob("*.ckpt"):
        with contextlib.suppress(UserError):
            checkpoint = read_checkpoint(file, mmap=True)
            read_content(checkpoint, str(file))
            steps[file] = checkpoint["global_step"]
    return max(steps, key=lambda file: (steps[file], file.name == LAST), default=None)


def check_checkpoint(file: str | Path) -> None:
    """Reject a file that is not a complete checkpoint of this package, before a model is loaded."""
    file = Path(file)
    if not file.is_file():
        raise UserError(
            f"--ckpt_path {file}: there is no such file. Expected a .ckpt file, or `last`.", "checkpoint.missing"
        )
    try:
        read_content(read_checkpoint(file, mmap=True), str(file))
    except UserError as error:
        newest = find_newest(file.parent)
        remedy = f"Resume from the newest good one, with `--ckpt_path {newest}`." if newest else "No other is good."
        raise UserError(f"--ckpt_path {error} {remedy}", "checkpoint.damaged") from error
