"""Outputs that are whole or not there: written beside, renamed when all has gone well."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from qlora_lightning.errors import UserError
from qlora_lightning.safe_file import find_storage_fault, flush, put_in_place

RECORD = "merge.json"  # in every folder that this command has written


def check_target(target: Path, option: str, force: bool) -> None:
    """Refuse to write over what is there, before a second is spent.

    Raises:
        UserError: There is something, and it is not to be replaced, or not what this command writes.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise UserError(f"{option} {target} exists: name another, or add --force to replace it.")
    if target.is_dir() and not (target / RECORD).is_file():
        raise UserError(
            f"{option} {target} holds something else than a merged model (no {RECORD}), which --force does not "
            "remove. Name another folder."
        )


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside ``target``, which takes its name at the end, and is gone where anything fails.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    place = target.absolute()
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
            _replace(staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Give a name beside ``target``; the file written there takes its name at the end, and is gone where all fails.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    staging = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        with _explained(target):
            yield staging
            put_in_place(staging, target)
    finally:
        staging.unlink(missing_ok=True)


def _remove_remains(place: Path) -> None:
    """Remove what a killed merge into the same folder has left."""
    for remains in place.parent.glob(f".{place.name}.*"):
        found = re.fullmatch(rf"\.{re.escape(place.name)}\.(\d+)\.[0-9a-f]{{8}}", remains.name)
        if found and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(remains)


def _replace(staging: Path, place: Path) -> None:
    old = staging.with_name(f"{staging.name}.old")
    if place.exists():
        os.replace(place, old)
    os.replace(staging, place)
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
