"""The best adapter of a run, in the model for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning import Trainer

from qlora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from qlora_lightning.model.adapters.lora import copy_tensors, trainable_tensors
from qlora_lightning.support.trainer import callbacks_of


@contextlib.contextmanager
def best_adapter(trainer: Trainer, module: Any) -> Iterator[None]:
    """Hold the best adapter in the model, and put the last one back."""
    writer: Any = next((c for c in callbacks_of(trainer) if isinstance(c, AdapterCheckpoint)), None)
    best = writer.read_best(trainer.default_root_dir) if writer else None
    if best is None:
        yield
        return
    last = {name: tensor.detach().clone() for name, tensor in trainable_tensors(module).items()}
    copy_tensors(module, best, "The best adapter")
    try:
        yield
    finally:
        copy_tensors(module, last, "The last adapter")
