"""How many bytes the base and what trains take, by the way in which they are stored."""

import math

from torch import nn

from qlora_lightning.model.targets import layer_of

STORAGES = ("fp32", "bf16", "int8", "nf4", "nf4 + double quantization")
_BLOCK, _OUTER_BLOCK = 64, 256  # numbers that share a scale, scales that share one in turn (QLoRA, section 3)


def name_storage(quantization: str, double_quant: bool, number_bytes: int) -> str:
    """Give the storage of a config's base; fp4 takes as much as nf4, fp16 as much as bf16.

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


def count_base_bytes(model: nn.Module, storage: str, other_bytes: int = 2) -> int:
    """Count the bytes of the frozen parameters.

    Quantized are the weights of the linears in decoder layers. Embedding, norms, biases and head keep ``other_bytes``
    each, but for fp32, which is all of it in 4.

    Args:
        model: Base with or without adapters; it may be on the meta device.
        storage: One of :data:`STORAGES`.
        other_bytes: Of a number that is not quantized.
    """
    if storage == "fp32":
        other_bytes = 4
    quantized = _quantized_shapes(model)
    whole = count_base_parameters(model) - sum(rows * columns for rows, columns in quantized)
    return whole * other_bytes + sum(_weight_bytes(*shape, storage, other_bytes) for shape in quantized)


def count_base_parameters(model: nn.Module) -> int:
    """Count the frozen numbers; a weight shared by embedding and head counts once."""
    quantized = sum(rows * columns for rows, columns in _quantized_shapes(model))
    return quantized + sum(p.numel() for p in _others(model) if not p.requires_grad)


def count_trained_parameters(model: nn.Module) -> int:
    """Count the numbers that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


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


def _quantized_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """Give ``(out, in)`` of the frozen linears in decoder layers, of the numbers that a packed weight stands for."""
    return [(linear.out_features, linear.in_features) for linear in _base_linears(model)]


def _base_linears(model: nn.Module) -> list[nn.Linear]:
    linears = [
        (name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and layer_of(name) is not None
    ]
    return [linear for name, linear in linears if not linear.weight.requires_grad and ".lora_" not in name]


def _others(model: nn.Module) -> list[nn.Parameter]:
    weights = {id(linear.weight) for linear in _base_linears(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in weights]
