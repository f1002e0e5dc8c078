"""What trains, counted: parameters, and bytes by dtype."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
from peft.tuners.lora import LoraLayer
from torch import nn

from qlora_lightning.base.tensors import format_bytes


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count trainable and all parameters; a 4-bit weight counts as the numbers that it stands for."""
    trainable = total = 0
    for parameter, state in _with_states(model):
        total += parameter.numel() if state is None else state.shape.numel()
        trainable += parameter.numel() * parameter.requires_grad
    return trainable, total


def bytes_by_dtype(model: nn.Module) -> dict[str, int]:
    """Sum the bytes of all parameters by dtype, the scales of quantized weights included."""
    sizes: dict[str, int] = defaultdict(int)
    for parameter, state in _with_states(model):
        if state is None:
            sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
            continue
        tensors = [parameter, state.absmax] + ([] if state.state2 is None else [state.state2.absmax])
        sizes[state.quant_type] += sum(tensor.nbytes for tensor in tensors)
    return dict(sizes)


def _with_states(model: nn.Module) -> Iterator[tuple[nn.Parameter, Any]]:
    """Yield each parameter, and what bitsandbytes knows of a 4-bit one; of a sharded weight its linear knows that."""
    of_linears = {id(each.weight): each.quant_state for each in model.modules() if isinstance(each, bnb.nn.Linear4bit)}
    for parameter in model.parameters():
        yield parameter, getattr(parameter, "quant_state", None) or of_linears.get(id(parameter))


def describe_sizes(model: nn.Module) -> str:
    """Describe in a line what carries an adapter, how many parameters train, and the bytes of all of them by dtype."""
    names = [name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    trainable, total = count_parameters(model)
    sizes = ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in bytes_by_dtype(model).items())
    return (
        f"Adapter on {len(names)} modules ({', '.join(dict.fromkeys(names))}): {trainable:,} of {total:,} parameters "
        f"train ({trainable / total:.2%}); in memory: {sizes}"
    )
