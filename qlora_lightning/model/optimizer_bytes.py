"""How many bytes an optimizer's state takes."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from qlora_lightning.model.adapters import trainable_tensors
from qlora_lightning.model.optimizer import build_optimizer

_ADAMW = 8, 4  # bytes: two float32 averages of each number, and a float32 count of steps for each tensor


def count_optimizer_bytes(model: nn.Module, choice: str | dict[str, Any] | None) -> int:
    """Count the bytes of the state after the first step.

    torch's AdamW by formula; any other takes a step on a tensor of each shape that trains, and its state is counted.

    Args:
        model: With its adapters; it may be on the meta device.
        choice: As ``model.optimizer`` takes it.

    Raises:
        UserError: The optimizer cannot be built.
    """
    shapes = Counter(parameter.shape for parameter in trainable_tensors(model).values())
    if choice is None:
        return sum(count * (_ADAMW[0] * shape.numel() + _ADAMW[1]) for shape, count in shapes.items())
    return sum(count * _measure(shape, choice) for shape, count in shapes.items())


def _measure(shape: torch.Size, choice: str | dict[str, Any]) -> int:
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = build_optimizer([{"params": [parameter]}], choice, learning_rate=1e-4, weight_decay=0.0, fused=False)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter].values()
    return sum(value.nbytes for value in state if torch.is_tensor(value) and value.numel() < 2 * shape.numel() + 2)
