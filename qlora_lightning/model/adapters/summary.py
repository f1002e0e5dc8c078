"""The table at the start: what is adapted, what trains, and how many bytes are in which dtype."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
from peft.tuners.lora import LoraLayer
from rich.table import Table
from torch import nn

from qlora_lightning.base.tensors import format_bytes
from qlora_lightning.model.adapters.lora import lora_matrices


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
            sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel() * parameter.element_size()
            continue
        tensors = [parameter, state.absmax] + ([] if state.state2 is None else [state.state2.absmax])
        sizes[state.quant_type] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return dict(sizes)


def _with_states(model: nn.Module) -> Iterator[tuple[nn.Parameter, Any]]:
    """Yield each parameter, and what bitsandbytes knows of a 4-bit one; of a sharded weight its linear knows that."""
    of_linears = {id(each.weight): each.quant_state for each in model.modules() if isinstance(each, bnb.nn.Linear4bit)}
    for parameter in model.parameters():
        yield parameter, getattr(parameter, "quant_state", None) or of_linears.get(id(parameter))


def adapter_table(model: nn.Module) -> Table:
    """List the adapted modules by kind, with the shapes and counts of A and B, and the totals below."""
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weights = lora_matrices(layer)
            key = (name.rpartition(".")[2], *(" × ".join(map(str, weight.shape)) for weight in weights))
            groups[key][0] += 1
            groups[key][1] += sum(weight.numel() for weight in weights)
    table = Table("module", title="Adapter", title_justify="left")
    for heading in ("layers", "A", "B", "trains"):
        table.add_column(heading, justify="right")
    for (module, a, b), (layers, count) in groups.items():
        table.add_row(module, str(layers), a, b, f"{count:,}")
    others = count_parameters(model)[0] - sum(count for _, count in groups.values())
    if others:
        table.add_row("trained beside", "", "", "", f"{others:,}")
    return table


def describe_sizes(model: nn.Module) -> str:
    """Describe in a line how many parameters train, and the bytes of all of them by dtype."""
    trainable, total = count_parameters(model)
    sizes = ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in bytes_by_dtype(model).items())
    return f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%}); in memory: {sizes}"
