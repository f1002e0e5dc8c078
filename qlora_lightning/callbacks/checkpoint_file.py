"""Checkpoint files: written straight to the disk and read back, found by ``--ckpt_path``, refused if damaged."""

import contextlib
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qlora_lightning.model.adapters.folder import UNFINISHED as UNFINISHED_ADAPTER
from qlora_lightning.model.checkpoint.format import read_content
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import find_storage_fault

CHECKPOINTS = "checkpoints"  # the folder of a run folder
UNFINISHED = "unfinished.ckpt"


class SaveFaults:
    """The first failure of a save; the other ranks must hear of it, or they would wait for the first forever."""

    def __init__(self) -> None:
        self.first: str | None = None

    @contextlib.contextmanager
    def noting(self, file: Path) -> Iterator[None]:
        """Note a failure of the disk as one to write ``file``; let every other error pass."""
        try:
            yield
        except Exception as error:
            reason = find_storage_fault(error)
            if reason is None:
                raise
            self.first = self.first or f"{file} could not be written: {reason}."


class _DirectWriter(TorchCheckpointIO):
    """Writes without Lightning's copy of the whole file in memory and its detour through the folder for temporaries."""

    def __init__(self, faults: SaveFaults) -> None:
        self.faults = faults

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with self.faults.noting(Path(path)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            try:
                with Path(path).open("wb") as handle:
                    torch.save(checkpoint, handle)
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # none of its tensors is read
            except Exception as error:
                if find_storage_fault(error):
                    raise
                self.faults.first = self.faults.first or (
                    f"The checkpoint would not be read again: {_reason(error)}. Every state_dict must hold tensors, "
                    "numbers, strings, booleans and None, in lists, tuples, sets and dicts, and nothing else."
                )


def write_checkpoint(trainer: Trainer, file: Path, faults: SaveFaults) -> None:
    """Write a checkpoint of this moment, and read it back; every rank takes part, and the first writes."""
    usual, trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io, _DirectWriter(faults)
    try:
        trainer.save_checkpoint(file, weights_only=False)
    finally:
        trainer.strategy.checkpoint_io = usual


def clear_remains(checkpoints: Path, adapter: Path) -> None:
    """Remove what a kill or a full disk left half written in a run's two folders, as far as it can be."""
    with contextlib.suppress(OSError):
        for file in checkpoints.glob("*unfinished"):
            file.unlink()
        (checkpoints / UNFINISHED).unlink(missing_ok=True)
        shutil.rmtree(adapter / UNFINISHED_ADAPTER)


def find_checkpoint(folder: str | Path, name: str | None) -> str | None:
    """Return the file that ``--ckpt_path`` means; ``last`` is the run folder's last checkpoint, ``None`` without one.

    A kill during the very first save may leave a whole checkpoint under its own name and no ``last.ckpt``: then it is
    the last.

    Raises:
        UserError: ``last.ckpt`` is damaged.
    """
    if name != "last":
        return name
    file = Path(folder) / CHECKPOINTS / "last.ckpt"
    if file.exists():
        check_checkpoint(file)
        return str(file)
    found = find_newest(file.parent)
    return None if found is None else str(found)


def find_newest(folder: Path, besides: str = "") -> Path | None:
    """Return the checkpoint of most optimizer steps in a folder that can be resumed; ``last.ckpt`` among equals."""
    names = (UNFINISHED, besides)
    files = [file for file in folder.glob("*.ckpt") if file.name not in names and file.is_file()]
    whole = [file for file in files if _find_fault(file) is None]
    return max(whole, key=lambda file: (_read_step(file), file.stem == "last"), default=None)


def check_checkpoint(file: str | Path) -> None:
    """Refuse a file that is not a whole checkpoint of ours, before anything is loaded for it.

    Raises:
        UserError: It is missing, cut off, damaged, foreign, or lacks a part.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"--ckpt_path {file}: there is no such file. Expected a .ckpt file, or `last`.")
    fault = _find_fault(file)
    if fault is None:
        return
    better = find_newest(file.parent, besides=file.name)
    remedy = "There is no good checkpoint beside it."
    if better is not None:
        remedy = f"The newest good one beside it is {better}: resume from it with `--ckpt_path {better}`."
    raise UserError(f"--ckpt_path {fault} {remedy}")


def _find_fault(file: Path) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load does not look at the checksums of tensors
            damaged = archive.testzip()
        checkpoint = None if damaged else torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of torch, zipfile or the disk: cut off, a flipped bit, a class that needs code to run
        return f"{file} is damaged or not a checkpoint: {_reason(error)}."
    if damaged:
        return f"{file} is damaged: {damaged} in it does not fit its checksum."
    try:
        read_content(checkpoint if isinstance(checkpoint, dict) else {}, str(file))
    except UserError as error:
        return str(error)
    return None


def _read_step(file: Path) -> int:
    return int(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def _reason(error: Exception) -> str:
    """Return what matters in torch's long explanation: a class that plain data do not have, or its first line."""
    found = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"it holds a {found[1]}" if found else first.rstrip(".")
