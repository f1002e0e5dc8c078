"""Rotary position embedding that keeps only its angles for backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Rotary(torch.autograd.Function):
    """Turn each pair ``(x[i], x[i + half])`` by its position's angle (Su et al. 2021, RoFormer).

    As transformers' ``apply_rotary_pos_emb`` lays pairs out. The angles get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn ``(1, heads, tokens, head_dim)`` by ``cos`` and ``sin`` ``(1, tokens, head_dim)``."""
        ctx.save_for_backward(cos, sin)
        cos, sin, half = cos[:, None], sin[:, None], states.shape[-1] // 2
        turned = states * cos
        turned[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(states[..., :half], sin[..., half:])
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = (angle[:, None] for angle in ctx.saved_tensors)
        half = grad.shape[-1] // 2
        turned = grad * cos
        turned[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        turned[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return turned, None, None
