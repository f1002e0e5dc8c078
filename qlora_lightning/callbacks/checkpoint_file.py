"""Checkpoint files: collected and written, found by ``--ckpt_path``, rejected if damaged."""

import contextlib
import zipfile
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
    """Keep what Lightning would write: a disk that fails while the other ranks wait for it would stop them forever."""

    content: dict[str, Any] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.content = checkpoint


def collect_checkpoint(trainer: Trainer) -> dict[str, Any] | None:
    """Return the content of a checkpoint of this moment on the first rank; every rank takes part."""
    collector = _Collector()
    usual, trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io, collector
    try:
        trainer.save_checkpoint(LAST, weights_only=False)
    finally:
        trainer.strategy.checkpoint_io = usual
    return collector.content


def write_checkpoint(content: dict[str, Any], file: Path) -> None:
    """Write a checkpoint aside and rename it: a kill or a full disk leaves the old file or the new one."""
    unfinished = file.with_name("unfinished")  # one name for all: the next save replaces what a kill left
    unfinished.unlink(missing_ok=True)  # it may be a link that leads elsewhere
    try:
        with unfinished.open("xb") as handle:
            torch.save(content, handle)
        put_in_place(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def reporting_disk_faults(run_folder: str | Path) -> Iterator[None]:
    """Report in one sentence why the disk rejects a write, and from where the run can be resumed; pass other errors."""
    try:
        yield
    except Exception as error:
        fault: BaseException | None = error
        while fault is not None and not isinstance(fault, OSError):  # torch hides it behind a RuntimeError of its own
            fault = fault.__cause__ or fault.__context__
        if fault is None:
            raise
        whole = find_newest(Path(run_folder) / CHECKPOINTS)
        remedy = "Make room, or choose another folder."
        if whole is not None:
            remedy = f"{whole} is whole: when that is solved, resume from it with `--ckpt_path {whole}`."
        reason = fault.strerror or str(fault)
        raise UserError(f"trainer.default_root_dir {run_folder} cannot be written to: {reason}. {remedy}") from error


def find_checkpoint(run_folder: str | Path, name: str | None) -> str | None:
    """Return the file that ``--ckpt_path`` means; ``last`` is the run folder's last one, ``None`` without one."""
    if name != "last":
        return name
    file = Path(run_folder) / CHECKPOINTS / LAST
    if file.exists():
        check_checkpoint(file)
        return str(file)
    found = find_newest(file.parent)  # a kill during the very first save may leave one under its own name alone
    return None if found is None else str(found)


def find_newest(folder: Path) -> Path | None:
    """Return the undamaged checkpoint of most optimizer steps in a folder; ``last.ckpt`` among equals."""
    steps: dict[Path, int] = {}
    for file in folder.glob("*.ckpt"):
        with contextlib.suppress(UserError):
            steps[file] = _read_whole(file)["global_step"]
    return max(steps, key=lambda file: (steps[file], file.name == LAST), default=None)


def check_checkpoint(file: str | Path) -> None:
    """Reject a file that is not a whole checkpoint of ours, before anything is loaded for it."""
    file = Path(file)
    if not file.is_file():
        raise UserError(f"--ckpt_path {file}: there is no such file. Expected a .ckpt file, or `last`.")
    try:
        _read_whole(file)
    except UserError as error:
        better = find_newest(file.parent)
        remedy = f"Resume from the newest good one, with `--ckpt_path {better}`." if better else "No other is good."
        raise UserError(f"--ckpt_path {error} {remedy}") from error


def _read_whole(file: Path) -> dict[str, Any]:
    """Read a checkpoint of ours, and compare the checksums of its tensors, at which ``torch.load`` does not look."""
    content = read_checkpoint(file, mmap=True)  # first: it rejects what is compressed
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, EOFError) as error:  # or encrypted, or too new
        raise UserError(f"{file} is damaged or not a checkpoint: {' '.join(str(error).split())}.") from error
    if damaged:
        raise UserError(f"{file} is damaged: {damaged} in it does not fit its checksum.")
    read_content(content, str(file))
    return content
