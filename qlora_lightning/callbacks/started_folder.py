"""Keeps a run folder to one run: what holds a run already is gone on with, or left alone."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lightning import Trainer

from qlora_lightning.support.errors import UserError

CHECKPOINTS = "checkpoints"  # the folder of a run folder
UNFINISHED = "unfinished.ckpt"


def goes_on(trainer: Trainer) -> bool:
    """Whether a fit goes on with the run of its folder: from a checkpoint of it, or with the Trainer that made it.

    Args:
        trainer: Not before ``on_fit_start``, when it knows its ``ckpt_path``.
    """
    file = trainer.ckpt_path
    return _lies_in(file, trainer.default_root_dir) if file else trainer.global_step > 0


def refuse_started_folder(run_folder: str | Path, resumed: str | Path | None = None, table: bool = False) -> None:
    """Refuse a folder that holds a run already, unless that is the run that goes on.

    Args:
        run_folder: Where a run is to write.
        resumed: The checkpoint that it goes on from.
        table: Whether ``metrics.csv`` alone counts as a run.

    Raises:
        UserError: It holds another run.
    """
    folder = Path(run_folder)
    if resumed is not None and _lies_in(resumed, folder):
        return
    saved = any(file.name != UNFINISHED for file in (folder / CHECKPOINTS).glob("*.ckpt"))
    if saved or (table and (folder / "metrics.csv").exists()):
        other = "" if resumed is None else f" {resumed} is not of it."
        raise UserError(
            f"{folder} holds a run already, which would be lost.{other} Go on with it by `--ckpt_path last` (in "
            f'Python: ckpt_path="{folder / CHECKPOINTS / "last.ckpt"}"), or name another folder by '
            "`--trainer.default_root_dir runs/NAME`."
        )


def refuse_everywhere(trainer: Trainer, check: Callable[[], object]) -> None:
    """Let the first process check something, and every process end if it refuses.

    Raises:
        UserError: It does.
    """
    fault = None
    if trainer.is_global_zero:
        try:
            check()
        except UserError as error:
            fault = str(error)
    fault = trainer.strategy.broadcast(fault)
    if fault is not None:
        raise UserError(fault)


@contextlib.contextmanager
def writing_to(run_folder: str | Path) -> Iterator[None]:
    """Word what the system has against a run folder.

    Raises:
        UserError: It has something.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"trainer.default_root_dir {run_folder} cannot be written to: {error.strerror}. Name another folder."
        ) from error


def _lies_in(file: str | Path, run_folder: str | Path) -> bool:
    folder = Path(file).resolve().parent
    owner = folder.parent if folder.name == CHECKPOINTS else None  # a run's folder may hold those of others
    run = Path(run_folder).resolve()
    return owner == run if owner else run in (folder, *folder.parents)
