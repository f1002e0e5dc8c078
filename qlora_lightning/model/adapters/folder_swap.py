"""Fills a folder of several files anew, so that a kill or a full disk never leaves files of two fillings in it."""

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from qlora_lightning.safe_file import flush

_STAGING = ".writing"


def refill_folder(folder: Path, write: Callable[[Path], Any], key_file: str, own: Collection[str] = ()) -> None:
    """Let ``write`` fill a folder beside, and bring its files into ``folder`` when all of them are on the disk.

    Where only ``key_file`` differs from what is there, it alone is replaced, in one rename. Where others do too, the
    whole folder is, in two, and :func:`settle_folder` mends what a kill between them leaves. Files of the user's stay.

    Args:
        folder: What to fill; made if it is not there.
        write: Fills the folder that it is given.
        key_file: The file without which the others are worth nothing.
        own: Names that an earlier filling may have written; they go where this one does not write them.

    Raises:
        OSError: The disk is full or fails; the folder is as it was.
    """
    folder = Path(os.path.realpath(folder))  # where the user has it elsewhere, by a link
    settle_folder(folder)
    staging = folder / _STAGING
    staging.mkdir(parents=True)
    write(staging)
    files = sorted(staging.iterdir())
    for file in [*files, staging]:
        flush(file)
    others = [file for file in files if file.name != key_file]
    stale = {name for name in own if (folder / name).exists()} - {file.name for file in files}
    alike = not stale and all(_equal(file, folder / file.name) for file in others)
    if alike or not (folder / key_file).exists():
        for name in stale:
            (folder / name).unlink()
        for file in [*others, staging / key_file]:
            os.replace(file, folder / file.name)
        staging.rmdir()
    else:
        new, old = _beside(folder)
        os.replace(staging, new)
        os.replace(folder, old)
        os.replace(new, folder)
        for name in stale:
            (old / name).unlink()
        _finish(folder, old)
    flush(folder)
    flush(folder.parent)


def settle_folder(folder: Path) -> None:
    """Put right what a kill inside :func:`refill_folder` left; does nothing where there is nothing to do."""
    folder = Path(os.path.realpath(folder))
    new, old = _beside(folder)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    elif old.exists():
        _finish(folder, old)
    for place in (new, folder / _STAGING):
        if place.exists():
            shutil.rmtree(place)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")


def _finish(folder: Path, old: Path) -> None:
    """Take over what is the user's, and drop the rest of the old folder."""
    for entry in sorted(old.iterdir()):
        if not (folder / entry.name).exists():
            os.replace(entry, folder / entry.name)
    shutil.rmtree(old)


def _equal(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()
