"""Writes a checkpoint straight into its file, and keeps a failure of the disk until all ranks can be told."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qlora_lightning.safe_file import find_storage_fault


class SaveFaults:
    """What the disk had against a save; the other ranks must hear of it, or they would wait for the first forever."""

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
            with Path(path).open("wb") as handle:
                torch.save(checkpoint, handle)


def write_checkpoint(trainer: Trainer, file: Path, faults: SaveFaults) -> None:
    """Write a checkpoint of this moment; every rank takes part, and the first writes."""
    usual, trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io, _DirectWriter(faults)
    try:
        with faults.noting(file):
            trainer.save_checkpoint(file, weights_only=False)
    finally:
        trainer.strategy.checkpoint_io = usual
