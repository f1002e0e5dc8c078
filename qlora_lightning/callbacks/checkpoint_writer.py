"""Writes a checkpoint straight into its file, and keeps what is against it until all ranks can be told."""

import contextlib
import io
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qlora_lightning.callbacks.started_folder import UNFINISHED
from qlora_lightning.model.adapters.folder import UNFINISHED as UNFINISHED_ADAPTER
from qlora_lightning.support.files import find_storage_fault


class Fault(NamedTuple):
    """Why a save failed.

    Attributes:
        sentence: What happened.
        remedy: When the run can go on.
    """

    sentence: str
    remedy: str


class SaveFaults:
    """What was against a save; the other ranks must hear of it, or they would wait for the first forever."""

    def __init__(self) -> None:
        self.first: Fault | None = None

    def note(self, sentence: str, remedy: str) -> None:
        """Keep a fault, if it is the first."""
        self.first = self.first or Fault(sentence, remedy)

    @contextlib.contextmanager
    def noting(self, file: Path) -> Iterator[None]:
        """Note a failure of the disk as one to write ``file``; let every other error pass."""
        try:
            yield
        except Exception as error:
            reason = find_storage_fault(error)
            if reason is None:
                raise
            remedy = "when there is room, and the folder can be written to"
            self.note(f"{file} could not be written: {reason}.", remedy)


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
                odd = [] if find_storage_fault(error) else find_odd_values(checkpoint)
                if not odd:
                    raise
                self.faults.note(
                    f"The checkpoint would not be read again: {', '.join(odd)}; expected tensors, numbers, strings, "
                    "booleans and None, in lists, tuples, sets and dicts.",
                    "when every state_dict holds nothing else",
                )


def write_checkpoint(trainer: Trainer, file: Path, faults: SaveFaults) -> None:
    """Write a checkpoint of this moment, and read it back; every rank takes part, and the first writes."""
    usual, trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io, _DirectWriter(faults)
    try:
        with faults.noting(file):
            trainer.save_checkpoint(file, weights_only=False)
    finally:
        trainer.strategy.checkpoint_io = usual


def find_odd_values(content: Any, name: str = "") -> list[str]:
    """Say what ``torch.load(weights_only=True)`` would refuse: `callbacks['Mine']['seen'] is a datetime.date`."""
    if _is_readable(content):
        return []
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, Mapping):
        pairs = content.items()
    elif isinstance(content, list | tuple):
        pairs = enumerate(content)
    inner = [found for key, each in pairs for found in find_odd_values(each, f"{name}[{key!r}]" if name else str(key))]
    kind = type(content)
    return inner or [f"{name} is a {kind.__module__}.{kind.__qualname__}"]


def _is_readable(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # pickle, torch and what a class does in its own __reduce__ have many
        return False
    return True


def clear_remains(checkpoints: Path, adapter: Path) -> None:
    """Remove what a kill or a full disk left half written in a run's two folders, as far as it can be."""
    with contextlib.suppress(OSError):
        for file in checkpoints.glob("*unfinished"):
            file.unlink()
        (checkpoints / UNFINISHED).unlink(missing_ok=True)
        shutil.rmtree(adapter / UNFINISHED_ADAPTER)
