"""Rotary position embedding that keeps only its angles for backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lightning.model.kernels import loops


class Rotary(torch.autograd.Function):
    """Turn each pair ``(x[i], x[i + half])`` by its position's angle (Su et al. 2021, RoFormer).

    As transformers' ``apply_rotary_pos_emb`` lays pairs out. The angles get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn ``(1, heads, tokens, head_dim)`` by ``cos`` and ``sin`` ``(1, tokens, head_dim)``."""
        ctx.save_for_backward(cos, sin)
        if _can_loop(states, cos, sin):
            return loops.rotate(states.transpose(1, 2)[0], cos[0], sin[0], back=False)[None].transpose(1, 2)
        cos, sin, half = cos[:, None], sin[:, None], states.shape[-1] // 2
        turned = states * cos
        turned[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(states[..., :half], sin[..., half:])
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if _can_loop(grad, cos, sin):
            return loops.rotate(grad.transpose(1, 2)[0], cos[0], sin[0], back=True)[None].transpose(1, 2), None, None
        cos, sin, half = cos[:, None], sin[:, None], grad.shape[-1] // 2
        turned = grad * cos
        turned[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        turned[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return turned, None, None


def _can_loop(states: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether it is one stream, of which each token's heads lie together."""
    return len(states) == len(cos) == 1 and loops.can_run(states.transpose(1, 2), cos, sin)
