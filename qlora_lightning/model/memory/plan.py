"""The memory of a training step, planned from shapes alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qlora_lightning.model.batch import BatchShape
from qlora_lightning.model.memory.kept import (
    holes_of_checkpoints,
    kept_by_layers,
    kept_outside,
    room_of_backward,
    room_of_logits,
    room_of_loss,
)
from qlora_lightning.model.memory.shapes import BaseShape, LayerShape, ModelShape
from qlora_lightning.model.optimizer import build_optimizer, check_optimizer

_TWO_AVERAGES, _STEP = 8, 4  # bytes: of each number in float32; a float32 count of steps for each tensor
# bitsandbytes' Adams in 8 bits: two averages of a byte, in blocks with a float32 scale; small tensors stay in 32 bits
_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")
_BLOCK, _FEWEST = 256, 4096


def count_optimizer_bytes(shapes: Mapping[tuple[int, ...], int], choice: str | dict[str, Any] | None) -> int:
    """Count the bytes of the state after the first step.

    torch's AdamW and bitsandbytes' Adams in 8 bits by formula; any other takes a step on a tensor of each shape.

    Args:
        shapes: How many tensors of which shape train.
        choice: As ``model.optimizer`` takes it.

    Raises:
        UserError: The optimizer cannot be built.
    """
    kind, _ = check_optimizer(choice, learning_rate=1e-4, weight_decay=0.0)
    return sum(count * _count(shape, choice, kind) for shape, count in shapes.items())


def _count(shape: tuple[int, ...], choice: str | dict[str, Any] | None, kind: type[torch.optim.Optimizer]) -> int:
    numbers = math.prod(shape)
    if choice is None:
        return _TWO_AVERAGES * numbers + _STEP
    if kind.__module__.startswith("bitsandbytes.") and kind.__name__ in _EIGHT_BIT and isinstance(choice, str):
        return 2 * (numbers + 4 * math.ceil(numbers / _BLOCK)) if numbers >= _FEWEST else _TWO_AVERAGES * numbers
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = build_optimizer([{"params": [parameter]}], choice, learning_rate=1e-4, weight_decay=0.0, fused=False)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter].items()  # with code tables of bitsandbytes, which all tensors share
    return sum(value.nbytes for name, value in state if torch.is_tensor(value) and not name.startswith("qmap"))


_MASTER = 4  # bytes: adapters and their gradients are float32
_FLOAT32 = 4  # bytes of a number
_FAULT = 65_536  # bytes that Linux maps around an address that is read, where the file lies in its cache
_FIRST_STEP_FLOAT32 = 92_000_000
_FIRST_STEP, _NEW_LENGTH, MOST_LENGTHS = 62_000_000, 46_000_000, 25
PARTS = {
    "base": "frozen",
    "adapters": "float32",
    "gradients": "of the adapters, float32",
    "optimizer": "its state",
    "activations": "kept until backward",
    "logits": "at a time",
    "workspace": "what else a step makes and drops",
    "kernels": "of a CPU, and holes in its heap",
    "process": "Python, libraries, data",
}


@dataclass(frozen=True)
class StepSettings:
    """What of a config decides how much memory a step takes.

    Attributes:
        storage: Of the base; see :data:`qlora_lightning.model.memory.shapes.STORAGES`.
        number_bytes: Of a number in the dtype of the products.
        optimizer: As ``model.optimizer`` takes it.
        device: ``cpu`` or ``cuda``.
        process: Bytes of the process without the model, on a CPU; of the context on CUDA.
        batch_lengths: How many numbers of tokens the run's micro-batches have.
        unread: Share of the embedding that is never read: on a CPU a base that is mapped from the cache lies in memory
            only where it was read.
    """

    storage: str
    number_bytes: int
    optimizer: str | dict[str, Any] | None
    device: str
    process: int
    batch_lengths: int = 1
    unread: float = 0.0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, in the order of :data:`PARTS`; they add up to the peak."""

    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The most at a time."""
        return sum(self.parts.values())


def _unread(base: BaseShape, settings: StepSettings) -> int:
    rows, width = base.embedding
    return round(settings.unread * rows * width * settings.number_bytes) if settings.device == "cpu" else 0


def share_unread(ids: npt.NDArray[np.int32], base: BaseShape, number_bytes: int) -> float:
    """Give the share of an embedding that no token of the data reads.

    Args:
        ids: Token ids of the data.
        base: Whose embedding it is.
        number_bytes: Of a number of it.
    """
    rows, width = base.embedding
    if not rows:
        return 0.0
    together = max(1, _FAULT // (width * number_bytes))
    return 1 - len(np.unique(ids // together)) / math.ceil(rows / together)


def _kernels(settings: StepSettings, layers: Sequence[LayerShape]) -> int:
    """Count what torch's products keep on a CPU; measured on SmolLM2 in bf16, over 6 to 100 steps, holes included.

    oneDNN makes kernels for each number of rows and keeps the last 1,024; between tensors they also break up the heap.
    Products of float32 are another library's, which makes none (measured over 6 and 75 steps).
    """
    if settings.device != "cpu":
        return 0
    if settings.number_bytes == _FLOAT32:
        return _FIRST_STEP_FLOAT32 + holes_of_checkpoints(layers, settings.number_bytes)
    return _FIRST_STEP + _NEW_LENGTH * (min(settings.batch_lengths, MOST_LENGTHS) - 1)


def plan_memory(model: ModelShape, batch: BatchShape, settings: StepSettings) -> MemoryPlan:
    """Predict the memory of training steps on a micro-batch.

    The peak is that of a step after the first, when the optimizer has its state: either where the loss is computed or
    in the backward of a layer.

    Args:
        model: Base and adapters.
        batch: The largest micro-batch.
        settings: Of the config.
    """
    e, device = settings.number_bytes, settings.device
    layers, vocabulary, trained = model.layers, model.vocabulary, model.count_trained()
    logits = room_of_logits(batch, vocabulary, e, device)
    of_loss = room_of_loss(layers, batch, vocabulary, e, device)
    workspace = max(of_loss, room_of_backward(layers, batch, e, device) - logits)
    sizes = (
        model.base.count_bytes(settings.storage, e) - _unread(model.base, settings),
        _MASTER * trained,
        _MASTER * trained,
        count_optimizer_bytes(model.trained(), settings.optimizer),
        kept_by_layers(layers, batch, e, device) + kept_outside(layers, batch, e),
        logits,
        workspace,
        _kernels(settings, layers),
        settings.process,
    )
    return MemoryPlan(dict(zip(PARTS, sizes, strict=True)))
