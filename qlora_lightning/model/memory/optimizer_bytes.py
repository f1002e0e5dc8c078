"""How many bytes an optimizer's state takes."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qlora_lightning.model.optimization.optimizer import build_optimizer, check_optimizer

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
