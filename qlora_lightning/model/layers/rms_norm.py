"""RMSNorm (Zhang and Sennrich 2019) with a frozen weight, forward and backward, over rows of one width."""

from typing import NamedTuple

import torch
from torch import Tensor

from qlora_lightning.model.kernels import loops


class Again(NamedTuple):
    """What backward makes again of a norm.

    Attributes:
        normed: The norm's output.
        scaled: ``x̂``, the same before the weight, in float32; ``None`` where the gradient can do without.
    """

    normed: Tensor
    scaled: Tensor | None


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Give the norm's output and ``1 / sqrt(mean(x²) + eps)`` of each row, ``(rows, 1)``, at least in float32.

    torch's way rounds before the weight, as transformers does, the loops once.

    Args:
        x: ``(rows, width)``.
        weight: ``(width,)``.
        eps: Of the norm.
    """
    if loops.can_run(x, weight):
        return loops.normalize(x, weight, eps)
    scaled = _precise(x)
    squares: Tensor = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).square_()
    inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return _weigh(scaled.mul_(inverse), weight, x.dtype), inverse


def normalize_again(x: Tensor, weight: Tensor, inverse: Tensor) -> Again:
    """Give what :func:`normalize` gave, bit for bit, and what its gradient may need."""
    if loops.can_run(x, weight):
        return Again(loops.normalize_again(x, weight, inverse), None)
    scaled = _precise(x).mul_(inverse)
    return Again(_weigh(scaled, weight, x.dtype), scaled)


def gradient(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, again: Again) -> Tensor:
    """Give the gradient of x from g, that of ``w · x̂`` where ``x̂ = x · inverse``: ``inverse (w g - x̂ mean(w g x̂))``.

    What is given as g may be written over.
    """
    if again.scaled is None:
        return loops.normalize_backward(grad, x, weight, inverse)
    precise = _precise(grad).mul_(weight.to(again.scaled.dtype))
    mean = (again.scaled * precise).mean(-1, keepdim=True)
    return precise.addcmul_(again.scaled, mean, value=-1).mul_(inverse).to(x.dtype)


def _precise(x: Tensor) -> Tensor:
    """Copy in float32, or better, once: an operation on mixed dtypes would make such a copy each time."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _weigh(scaled: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return scaled.to(dtype, copy=True).mul_(weight)
