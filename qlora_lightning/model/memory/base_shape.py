"""How many bytes the frozen part of a model takes, however it is stored."""

import math
from dataclasses import dataclass

from torch import nn

from qlora_lightning.model.adapters.targets import layer_of

STORAGES = ("fp32", "bf16", "int8", "nf4", "nf4, double quantized")
_BLOCK, _OUTER_BLOCK = 64, 256  # numbers that share a scale, scales that share one in turn (QLoRA, section 3)


@dataclass(frozen=True)
class BaseShape:
    """What of a model is frozen.

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
        """Count the bytes.

        Args:
            storage: One of :data:`STORAGES`.
            other_bytes: Of a number that is not quantized; in fp32 all are of 4.
        """
        other_bytes = 4 if storage == "fp32" else other_bytes
        return self.others * other_bytes + sum(_weight_bytes(*shape, storage, other_bytes) for shape in self.weights)


def read_base(model: nn.Module) -> BaseShape:
    """Describe what of a causal language model, with or without adapters, is frozen; it may be hollow."""
    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and layer_of(name) is not None and ".lora_" not in name
    ]
    frozen = [linear for linear in linears if not linear.weight.requires_grad]
    weights = {id(linear.weight) for linear in frozen}
    others = sum(p.numel() for p in model.parameters() if not p.requires_grad and id(p) not in weights)
    return BaseShape(tuple((linear.out_features, linear.in_features) for linear in frozen), others)


def name_storage(quantization: str, double_quant: bool, number_bytes: int) -> str:
    """Return the storage of a config's base; fp4 takes as much as nf4, fp16 as much as bf16.

    Args:
        quantization: As ``model.quantization`` has it.
        double_quant: As ``model.double_quant`` has it.
        number_bytes: Of a number in the dtype of the products, in which a base that is not quantized is held.
    """
    if quantization in ("nf4", "fp4"):
        return STORAGES[4] if double_quant else STORAGES[3]
    if quantization == "int8":
        return STORAGES[2]
    return STORAGES[0] if number_bytes > 2 else STORAGES[1]


def _weight_bytes(rows: int, columns: int, storage: str, other_bytes: int) -> int:
    """Count the bytes of one weight with its scales, but without the few hundred of its code table."""
    numbers = rows * columns
    if storage in ("fp32", "bf16"):
        return numbers * other_bytes
    if storage == "int8":
        return numbers + 4 * rows
    scales = math.ceil(numbers / _BLOCK)
    packed = math.ceil(numbers / 2)
    return packed + (4 * scales if storage == "nf4" else scales + 4 * math.ceil(scales / _OUTER_BLOCK))
