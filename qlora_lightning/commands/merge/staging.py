"""Outputs that are whole or not there: written beside, renamed when all has gone well."""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import find_storage_fault, flush, is_stream, put_in_place

RECORD = "merge.json"  # in every folder that this command has written
_OLD = ".old"


def check_folder(target: Path, force: bool) -> None:
    """Refuse to write over what is there, before a second is spent.

    Raises:
        UserError: There is something, and it is not to be replaced, or holds what this command did not write.
    """
    try:
        _put_back(Path(os.path.realpath(target)))
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
        if not target.is_dir():
            raise UserError(f"--out {target}: that is a file; name a folder.")
        if not force:
            raise UserError(f"--out {target} exists: name another, or add --force to replace it.")
        own = _read_record(target)
        if own is None:
            raise UserError(
                f"--out {target} holds something else than a merged model (no {RECORD} of one), which --force does not "
                "remove. Name another folder."
            )
        foreign = [name for name in list_files(target) if name not in own]
    except OSError as error:
        raise UserError(f"--out {target} cannot be read: {error.strerror}.") from error
    if foreign:
        raise UserError(
            f"--out {target} holds {foreign[0]}, which merge did not write and --force does not remove. Move it "
            "away, or name another folder."
        )


def check_file(target: Path, force: bool) -> None:
    """Refuse to write a GGUF file over another file.

    Raises:
        UserError: There is one, and it is not to be replaced, or no GGUF file.
    """
    if is_stream(target):
        raise UserError(f"--adapter-gguf {target} is a pipe or a device: name a file.")
    if not target.exists():
        return
    if not force:
        raise UserError(f"--adapter-gguf {target} exists: name another, or add --force to replace it.")
    with target.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"--adapter-gguf {target} is no GGUF file, which --force does not replace. Name another.")


def list_files(folder: Path) -> list[str]:
    """Give the paths of all files in a folder, and of folders without one, relative to it."""
    found = (each for each in folder.rglob("*") if each.is_symlink() or not each.is_dir() or not any(each.iterdir()))
    return sorted(each.relative_to(folder).as_posix() for each in found)


@contextlib.contextmanager
def staged_folder(target: Path, force: bool) -> Iterator[Path]:
    """Give an empty folder beside ``target``, which takes its name at the end, and is gone where anything fails.

    A link is followed: the folder that it leads to is replaced. What came into it meanwhile is not.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    place = Path(os.path.realpath(target))
    staging = place.with_name(f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with _explained(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_remains(place)
        staging.mkdir()
    try:
        with _explained(target):
            yield staging
            for file in [*staging.rglob("*"), staging]:
                flush(file)
            check_folder(target, force)
            _replace(staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Give a name beside ``target``; the file written there takes its name at the end, and is gone where all fails.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    place = Path(os.path.realpath(target))
    staging = place.with_name(f".{place.name}.{os.getpid()}.unfinished")
    try:
        with _explained(target):
            yield staging
            put_in_place(staging, place)
    finally:
        staging.unlink(missing_ok=True)


def _remove_remains(place: Path) -> None:
    """Remove what a killed merge into the same folder has left."""
    for remains in _find_remains(place):
        shutil.rmtree(remains)


def _put_back(place: Path) -> None:
    """Give an earlier result its name again, where a merge was killed between hiding it and naming its own."""
    hidden = [remains for remains in _find_remains(place) if remains.suffix == _OLD]
    if hidden and not place.exists():
        os.replace(hidden[0], place)


def _find_remains(place: Path) -> list[Path]:
    """Find folders that merges which run no more have left beside a folder."""
    pattern = re.compile(rf"\.{re.escape(place.name)}\.(\d+)\.[0-9a-f]{{8}}({re.escape(_OLD)})?")
    named = ((remains, pattern.fullmatch(remains.name)) for remains in place.parent.glob(f".{place.name}.*"))
    return [remains for remains, match in named if match and not psutil.pid_exists(int(match[1]))]


def _read_record(folder: Path) -> set[str] | None:
    """Give the names of the files that the command wrote into a folder; ``None`` where its record is not there."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {RECORD, *record["files"]} if "onto" in record else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _replace(staging: Path, place: Path) -> None:
    old = staging.with_name(f"{staging.name}{_OLD}")
    try:
        if place.exists():
            os.replace(place, old)
        os.replace(staging, place)
    except BaseException:  # Ctrl-C between the two
        if old.exists() and not place.exists():
            os.replace(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)
    flush(place.parent)


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        fault = find_storage_fault(error)
        if fault is None:
            raise
        raise UserError(f"{target} cannot be written: {fault}. Nothing is left of it.") from error
