"""The memory of a training step, planned from a hollow model: base, optimizer, and what a step makes."""

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
from qlora_lightning.model.adapters.targets import layer_of
from qlora_lightning.model.layers.lora import TILE_BYTES
from qlora_lightning.model.memory.layer_memory import measure_layers, rotated_width
from qlora_lightning.model.sharded.sharded_base import shards_vocabulary
from qlora_lightning.model.step.batch import BatchShape
from qlora_lightning.model.step.loss import rows_of_logits, rows_of_probabilities
from qlora_lightning.model.step.optimizer import build_optimizer

# ---- the base --------------------------------------------------------------------------------------------------------

STORAGES = ("fp32", "bf16", "int8", "nf4", "nf4, double quantized")
_BLOCK, _OUTER_BLOCK = 64, 256  # numbers that share a scale, scales that share one in turn (QLoRA, section 3)


@dataclass(frozen=True)
class BaseShape:
    """The frozen part of a model.

    Attributes:
        weights: ``(out, in)`` of the linears in decoder layers: what is quantized.
        others: Numbers of embedding, norms, biases and head; a weight shared by embedding and head counts once.
    """

    weights: tuple[tuple[int, int], ...]
    others: int

    @property
    def parameters(self) -> int:
        """How many numbers these are."""
        return self.others + sum(rows * columns for rows, columns in self.weights)

    def count_bytes(self, storage: str, other_bytes: int = 2) -> int:
        """Count the bytes, without the few hundred of code tables.

        Args:
            storage: One of :data:`STORAGES`.
            other_bytes: Of a number that is not quantized; in fp32 all are of 4.
        """
        if storage in ("fp32", "bf16"):
            return self.parameters * (4 if storage == "fp32" else other_bytes)
        total = self.others * other_bytes
        for rows, columns in self.weights:
            scales = math.ceil(rows * columns / _BLOCK)
            if storage == "int8":
                total += rows * columns + 4 * rows
            elif storage == "nf4":
                total += math.ceil(rows * columns / 2) + 4 * scales
            else:
                total += math.ceil(rows * columns / 2) + scales + 4 * math.ceil(scales / _OUTER_BLOCK)
        return total


def read_base(model: nn.Module) -> BaseShape:
    """Describe what of a causal language model, with or without adapters, is frozen; it may be hollow."""
    frozen = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and layer_of(name) is not None
        and ".lora_" not in name
        and not module.weight.requires_grad
    ]
    weights = {id(linear.weight) for linear in frozen}
    others = sum(p.numel() for p in model.parameters() if not p.requires_grad and id(p) not in weights)
    return BaseShape(tuple((linear.out_features, linear.in_features) for linear in frozen), others)


def name_storage(quantization: str, double_quant: bool, number_bytes: int) -> str:
    """Return the storage of a config's base; ``number_bytes`` are those of the compute dtype.

    fp4 takes as much as nf4, fp16 as much as bf16; a base that is not quantized is held in the compute dtype.
    """
    if quantization in ("nf4", "fp4"):
        return "nf4, double quantized" if double_quant else "nf4"
    if quantization == "int8":
        return "int8"
    return "fp32" if number_bytes > 2 else "bf16"


# ---- the optimizer ---------------------------------------------------------------------------------------------------

_TWO_AVERAGES, _STEP = 8, 4  # bytes: of each number in float32; a float32 count of steps for each tensor
# bitsandbytes' Adams in 8 bits: two averages of a byte, in blocks with a float32 scale; small tensors stay in 32 bits
_EIGHT_BIT = [f"bitsandbytes.optim.{name}8bit" for name in ("Adam", "AdamW", "PagedAdam", "PagedAdamW")]
_STATE_BLOCK, _FEWEST = 256, 4096


def count_optimizer_bytes(shapes: Mapping[tuple[int, ...], int], choice: str | dict[str, Any] | None) -> int:
    """Count the bytes of the state after the first step of so many tensors of each shape.

    torch's AdamW and bitsandbytes' Adams in 8 bits by formula; any other takes a step on a tensor of each shape.
    """
    return sum(count * _count(shape, choice) for shape, count in shapes.items())


def _count(shape: tuple[int, ...], choice: str | dict[str, Any] | None) -> int:
    numbers = math.prod(shape)
    if choice is None:
        return _TWO_AVERAGES * numbers + _STEP
    if choice in _EIGHT_BIT:
        return 2 * (numbers + 4 * math.ceil(numbers / _STATE_BLOCK)) if numbers >= _FEWEST else _TWO_AVERAGES * numbers
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = build_optimizer([{"params": [parameter]}], choice, learning_rate=1e-4, weight_decay=0.0, fused=False)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter].items()  # with code tables of bitsandbytes, which all tensors share
    return sum(value.nbytes for name, value in state if torch.is_tensor(value) and not name.startswith("qmap"))


# ---- a step ----------------------------------------------------------------------------------------------------------

_MASTER = 4  # bytes: adapters and their gradients are float32
_FLOAT, _INDEX = 4, 8  # bytes of a float32, of a position
_FAULT = 65_536  # bytes that Linux maps around an address that is read, if the file is in its cache
# What torch's products leave on a CPU, measured on SmolLM2 over 6 to 100 steps, holes in the heap included. oneDNN
# makes kernels for each number of rows, and keeps the last 1,024. Products of float32, of another library, have none.
_FIRST_STEP_FLOAT32 = 92_000_000
_FIRST_STEP, _NEW_LENGTH, MOST_LENGTHS = 62_000_000, 46_000_000, 25
PARTS = {
    "base": "frozen",
    "scales": "of the base, all of them",
    "vocabulary": "embedding and head",
    "gathered": "of the base, whole for a moment",
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
class Sharding:
    """How processes share a frozen base: each keeps a shard of every layer, embedding and head.

    Attributes:
        processes: How many share it.
        offload: Whether the shards are in host memory, or those of how many first layers.
    """

    processes: int
    offload: bool | int = False


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
        offload: Whether the inputs of these layers are in host memory, on CUDA.
        batch_lengths: How many numbers of tokens the run's micro-batches have.
        ids: Token ids of the data, if the base is mapped from a file: on a CPU only what they read of the embedding is
            in memory. ``None``: all of it is.
        sharding: ``None``: each process holds the base as a whole.
        processes: How many train.
    """

    device: str
    dtype: torch.dtype
    quantization: str
    double_quant: bool
    optimizer: str | dict[str, Any] | None
    process: int
    autocasts: bool = False
    every_n_layers: int = 0
    offload: bool = False
    batch_lengths: int = 1
    ids: Any = None
    sharding: Sharding | None = None
    processes: int = 1


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device.

    Attributes:
        parts: Bytes by part, in the order of :data:`PARTS`; they add up to the peak.
        host_bytes: Of a GPU's shard of the base that is in host memory.
    """

    parts: dict[str, int]
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most at a time."""
        return sum(self.parts.values())


def count_trained(model: nn.Module) -> int:
    """Count the numbers that train."""
    return sum(tensor.numel() for tensor in trainable_tensors(model).values())


def plan_memory(model: peft.PeftModel, batch: BatchShape, settings: StepSettings) -> MemoryPlan:
    """Predict the memory of training a hollow model on its largest micro-batch.

    The peak is that of a step after the first, when the optimizer has its state: either in the head's loss or in a
    layer.
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
        offload=settings.offload and device == "cuda",
    )
    saved, workspace = sum(saved for saved, _ in layers), max(workspace for _, workspace in layers)

    logits = min(rows_of_logits(vocabulary, e, device), batch.labelled) * vocabulary * e
    rows = min(rows_of_probabilities(vocabulary, e, device), batch.labelled)
    copies = 2 if device == "cpu" else 1  # softmax turns logits to float32 first
    of_loss = (batch.computed + batch.labelled) * width * e + copies * rows * vocabulary * _FLOAT

    # beside the layers: the input of the last norm, in float32, and the loss's gradient with its places
    saved += batch.computed * (width + 1) * _FLOAT + batch.labelled * (width * e + _INDEX)
    saved += 2 * batch.computed * rotated_width(causal_lm.config) * e  # the angles of rotary embedding
    total = base.count_bytes(name_storage(settings.quantization, settings.double_quant, e), e)
    frozen, gathered, host = (total - _unread(causal_lm, settings), 0, 0), (0, 0), 0
    if settings.sharding is not None:
        frozen, gathered, host = _shard(causal_lm, total, settings.sharding, device)
    in_layer = gathered[0], min(logits, workspace), max(0, workspace - logits)
    in_head = gathered[1], logits, of_loss
    gathered_bytes, logits, workspace = max(in_head, in_layer, key=sum)
    sizes = (
        *frozen,
        gathered_bytes,
        _MASTER * trained,
        _MASTER * trained * (1 if settings.processes == 1 and settings.sharding is None else 2),  # and DDP's buckets
        count_optimizer_bytes(shapes, settings.optimizer),
        saved,
        logits,
        workspace,
        _kernels(base, settings, len(layers)),
        settings.process,
    )
    return MemoryPlan(dict(zip(PARTS, sizes, strict=True)), host)


def _shard(
    causal_lm: Any, total: int, sharding: Sharding, device: str
) -> tuple[tuple[int, int, int], tuple[int, int], int]:
    """Divide a base of so many bytes as FSDP2 does, which gathers into one buffer and copies that to the parameters.

    Returns:
        Bytes that stay on the device, of layers, scales, and embedding and head; the most that is gathered at a time in
        the layers (a layer, and the buffer of the next one) and in the head; what is in host memory.
    """

    def sizes(module: nn.Module, processes: int) -> list[int]:  # split by rows
        frozen = (each for each in module.parameters() if not each.requires_grad)
        return [math.ceil(len(each) / processes) * (each.nbytes // len(each)) for each in frozen]

    def count(module: nn.Module, processes: int) -> int:
        return sum(sizes(module, processes))

    modules = [*causal_lm.model.layers]
    number, embedding, head = len(modules), causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    is_sharded = shards_vocabulary(causal_lm)
    ends = {each for end in (embedding, head) for each in end.parameters() if not each.requires_grad}
    modules += [embedding, head] if is_sharded else []
    whole = [count(module, 1) for module in modules]
    shards = [count(module, sharding.processes) for module in modules]
    offloaded = 0 if device == "cpu" else len(modules) if sharding.offload is True else min(sharding.offload, number)
    here = [0] * offloaded + shards[offloaded:]
    vocabulary = sum(here[number:]) if is_sharded else sum(each.nbytes for each in ends)
    stored = count(causal_lm, 1)
    frozen = stored - sum(whole) + sum(here) - vocabulary, total - stored, vocabulary
    on_the_way = max(shards[:number]) if offloaded else 0  # of a layer, from host memory
    host = sum(pinned_bytes(size) for module in modules[:offloaded] for size in sizes(module, sharding.processes))
    return frozen, (2 * max(whole[:number]) + on_the_way, 2 * max(whole[number:], default=0)), host


def pinned_bytes(size: int) -> int:
    """Return what a tensor takes in pinned host memory, which torch hands out in powers of two."""
    return 1 << (size - 1).bit_length()


def _unread(causal_lm: Any, settings: StepSettings) -> int:
    embedding, head = causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight
    if settings.device != "cpu" or settings.ids is None or embedding is head or embedding.requires_grad:
        return 0  # a head reads all of what it shares
    rows, row = len(embedding), int(embedding.shape[1]) * settings.dtype.itemsize
    together = max(1, _FAULT // row)
    read = len(np.unique(settings.ids // together)) / math.ceil(rows / together)
    return round((1 - read) * rows * row)


def _kernels(base: BaseShape, settings: StepSettings, layers: int) -> int:
    if settings.device != "cpu":
        return 0
    if settings.dtype.itemsize != _FLOAT:
        return _FIRST_STEP + _NEW_LENGTH * (min(settings.batch_lengths, MOST_LENGTHS) - 1)
    # For each checkpointed layer one dense weight fits nowhere: what stays of the layer until backward, small as it is,
    # is where such a weight has been. Measured on SmolLM2: 110 MB after 4 steps, 140 after 40, where this gives 106.
    checkpointed = math.ceil(layers / settings.every_n_layers) if settings.every_n_layers else 0
    largest = max(rows * columns for rows, columns in base.weights) * _FLOAT
    return _FIRST_STEP_FLOAT32 + checkpointed * min(largest, TILE_BYTES)
