"""Finds the checkpoint that ``--ckpt_path`` means, and refuses one that is broken with a better one named."""

import errno
import re
import zipfile
from pathlib import Path

import torch

from qlora_lightning.callbacks.started_folder import CHECKPOINTS, UNFINISHED
from qlora_lightning.model.checkpoint.format import read_content
from qlora_lightning.support.errors import UserError


def find_checkpoint(folder: str | Path, name: str | None) -> str | None:
    """Turn ``--ckpt_path last`` into the run folder's last checkpoint; nothing where there is none yet.

    A kill during the very first save may leave a whole checkpoint under its own name and no ``last.ckpt``: then it is
    the last.

    Args:
        folder: The run folder.
        name: What ``--ckpt_path`` says.

    Raises:
        UserError: ``last.ckpt`` is broken.
    """
    if name != "last":
        return name
    file = Path(folder) / CHECKPOINTS / "last.ckpt"
    if file.exists():
        check_checkpoint(file)
        return str(file)
    found = _newest_good(file)
    return None if found is None else str(found)


def find_whole(folder: Path) -> Path | None:
    """Return the whole checkpoint of most optimizer steps in a folder, ``last.ckpt`` before others of its step."""
    last = folder / "last.ckpt"
    newest = _newest_good(last)
    if not last.exists() or _find_fault(last) is not None:
        return newest
    return newest if newest is not None and _read_step(newest) > _read_step(last) else last


def check_checkpoint(file: str | Path) -> None:
    """Refuse a file that is no whole checkpoint of ours, before anything is loaded for it.

    Raises:
        UserError: It is not there, cut off, damaged, foreign, or lacks a part.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"--ckpt_path {file}: there is no such file. Expected a .ckpt file, or `last`.")
    fault = _find_fault(file)
    if fault is None:
        return
    better = _newest_good(file)
    if better is None:
        raise UserError(f"--ckpt_path {fault} There is no good checkpoint beside it.")
    raise UserError(f"--ckpt_path {fault} The newest good one beside it is {better}: go on by `--ckpt_path {better}`.")


def _newest_good(other_than: Path) -> Path | None:
    """Give the checkpoint of most optimizer steps in a file's folder that can be resumed from."""
    others = (file for file in other_than.parent.glob("*.ckpt") if file.name not in (other_than.name, UNFINISHED))
    good = [(_read_step(file), file) for file in others if file.is_file() and _find_fault(file) is None]
    return max(good)[1] if good else None


def _find_fault(file: Path) -> str | None:
    try:
        if file.stat().st_size == 0:
            return f"{file} is no checkpoint: it is empty."
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has no exception of its own for a file that it cannot read
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: cut off, says mmap
            return f"{file} cannot be read: {error.strerror}."
        if not _is_whole(file):
            return f"{file} is no checkpoint, or it is cut off."
        return f"{file} is whole, but torch does not read it without running code: {_shorten(error)}."
    if not _is_whole(file):  # torch.load does not look at the checksums of tensors
        return f"{file} is damaged: what it holds does not fit its checksums."
    try:
        read_content(checkpoint if isinstance(checkpoint, dict) else {}, str(file))
    except UserError as error:
        return str(error)
    return None


def _is_whole(file: Path) -> bool:
    """Whether every part of the zip file that a checkpoint is fits its checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # a flipped bit may show as many: a bad header, an unknown compression, an encrypted part
        return False


def _shorten(error: Exception) -> str:
    """What was in the way, of torch's long explanation: a class that plain data have not, or its last words."""
    reason = str(error).strip() or type(error).__name__
    found = re.search(r"GLOBAL (\S+) was not an allowed global", reason)
    return f"it holds a {found[1]}" if found else reason.splitlines()[-1].strip().rstrip(".")


def _read_step(file: Path) -> int:
    return int(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"])
