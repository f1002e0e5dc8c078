"""The memory of a training step, planned from a hollow model."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
from torch import nn

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.batch import BatchShape
from qlora_lightning.model.layers.lora import TILE_BYTES
from qlora_lightning.model.loss import rows_of_logits, rows_of_probabilities
from qlora_lightning.model.memory.base_shape import BaseShape, name_storage, read_base
from qlora_lightning.model.memory.layer_memory import measure_layers
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
_FLOAT, _INDEX = 4, 8  # bytes of a float32, of a position
_FAULT = 65_536  # bytes that Linux maps around an address that is read, if the file is in its cache
# What torch's products leave on a CPU, measured on SmolLM2 over 6 to 100 steps, holes in the heap included. oneDNN
# makes kernels for each number of rows, and keeps the last 1,024. Products of float32, of another library, have none.
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
    """What decides, beside model and batch, how much memory a step takes.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: Of the products.
        quantization: As ``model.quantization`` has it.
        double_quant: As ``model.double_quant`` has it.
        optimizer: As ``model.optimizer`` takes it.
        process: Bytes of the process without the model, on a CPU; of the context on CUDA.
        autocasts: Whether PEFT's own layers train, which are autocast to the dtype.
        every_n_layers: Every n-th layer is checkpointed; 0: none.
        batch_lengths: How many numbers of tokens the run's micro-batches have.
        ids: Token ids of the data, if the base is mapped from a file: on a CPU only what they read of the embedding is
            in memory. ``None``: all of it is.
    """

    device: str
    dtype: torch.dtype
    quantization: str
    double_quant: bool
    optimizer: str | dict[str, Any] | None
    process: int
    autocasts: bool = False
    every_n_layers: int = 0
    batch_lengths: int = 1
    ids: Any = None


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, in the order of :data:`PARTS`; they add up to the peak."""

    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The most at a time."""
        return sum(self.parts.values())


def count_trained(model: nn.Module) -> int:
    """Count the numbers that train."""
    return sum(tensor.numel() for tensor in trainable_tensors(model).values())


def plan_memory(model: peft.PeftModel, batch: BatchShape, settings: StepSettings) -> MemoryPlan:
    """Predict the memory of training steps on a micro-batch.

    The peak is that of a step after the first, when the optimizer has its state: either in the head's loss or in a
    layer.

    Args:
        model: Base and adapters without numbers.
        batch: The largest micro-batch.
        settings: Of the config.
    """
    causal_lm: Any = model.get_base_model()
    base, width, vocabulary = read_base(causal_lm), causal_lm.config.hidden_size, len(causal_lm.lm_head.weight)
    trained, shapes = count_trained(model), Counter(tuple(each.shape) for each in trainable_tensors(model).values())
    device, e = settings.device, settings.dtype.itemsize
    layers = measure_layers(
        model,
        batch,
        device,
        settings.dtype,
        autocasts=settings.autocasts,
        every_n_layers=settings.every_n_layers,
    )
    saved, workspace = sum(saved for saved, _ in layers), max(workspace for _, workspace in layers)

    logits = min(rows_of_logits(vocabulary, e, device), batch.labelled) * vocabulary * e
    rows = min(rows_of_probabilities(vocabulary, e, device), batch.labelled)
    copies = 2 if device == "cpu" else 1  # softmax turns logits to float32 first
    of_loss = (batch.computed + batch.labelled) * width * e + copies * rows * vocabulary * _FLOAT

    # beside the layers: the input of the last norm, in float32, and the loss's gradient with its places
    saved += batch.computed * (width + 1) * _FLOAT + batch.labelled * (width * e + _INDEX)
    if settings.every_n_layers != 1:
        saved += 2 * batch.computed * causal_lm.config.head_dim * e  # the angles of rotary embedding
    storage = name_storage(settings.quantization, settings.double_quant, e)
    sizes = (
        base.count_bytes(storage, e) - _unread(causal_lm, settings),
        _MASTER * trained,
        _MASTER * trained,
        count_optimizer_bytes(shapes, settings.optimizer),
        saved,
        logits,
        max(of_loss, workspace - logits),
        _kernels(base, settings, len(layers)),
        settings.process,
    )
    return MemoryPlan(dict(zip(PARTS, sizes, strict=True)))


def _unread(causal_lm: Any, settings: StepSettings) -> int:
    embedding, head = causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight
    if settings.device != "cpu" or settings.ids is None or embedding is head or embedding.requires_grad:
        return 0  # a head reads all of what it shares
    rows, row = len(embedding), int(embedding.shape[1]) * settings.dtype.itemsize
    together = max(1, _FAULT // row)
    read = len(np.unique(settings.ids // together)) / math.ceil(rows / together)
    return round((1 - read) * rows * row)


def _kernels(base: BaseShape, settings: StepSettings, layers: int) -> int:
    e = settings.dtype.itemsize
    if settings.device != "cpu":
        return 0
    if e != _FLOAT:
        return _FIRST_STEP + _NEW_LENGTH * (min(settings.batch_lengths, MOST_LENGTHS) - 1)
    # For each checkpointed layer one dense weight fits nowhere: what stays of the layer until backward, small as it is,
    # is where such a weight has been. Measured on SmolLM2: 110 MB after 4 steps, 140 after 40, where this gives 106.
    checkpointed = math.ceil(layers / settings.every_n_layers) if settings.every_n_layers else 0
    largest = max(rows * columns for rows, columns in base.weights) * e
    return _FIRST_STEP_FLOAT32 + checkpointed * min(largest, TILE_BYTES)
