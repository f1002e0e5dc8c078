"""Rotary position embedding that keeps only its angles for backward, and how long rows may be for it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lightning.errors import UserError
from qlora_lightning.model.kernels import loops


class Rotary(torch.autograd.Function):
    """Turn each pair ``(x[i], x[i + half])`` by its position's angle (Su et al. 2021, RoFormer).

    As transformers' ``apply_rotary_pos_emb`` lays pairs out. The angles get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn ``(1, heads, tokens, head_dim)`` by ``cos`` and ``sin`` ``(1, tokens, head_dim)``."""
        ctx.save_for_backward(cos, sin)
        return _turn(states, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad, *ctx.saved_tensors, back=True), None, None


def _turn(states: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Turn, or give the gradient of that: the other way, each number by the angle where forward had put it."""
    by_token = states.transpose(1, 2)
    if len(states) == len(cos) == 1 and loops.can_run(by_token, cos, sin):
        return loops.rotate(by_token[0], cos[0], sin[0], back=back)[None].transpose(1, 2)
    cos, sin, half = cos[:, None], sin[:, None], states.shape[-1] // 2
    first, second = sin[..., :half], sin[..., half:]
    if back:
        first, second = second, first
    turned = states * cos
    turned[..., :half].addcmul_(states[..., half:], first, value=1 if back else -1)
    turned[..., half:].addcmul_(states[..., :half], second, value=-1 if back else 1)
    return turned


def rope_limit(config: Any) -> int | None:
    """Return how long rows may be before the angles of all rows of a batch depend on its longest one.

    The types ``dynamic`` (NTK) and ``longrope`` scale all angles by the longest row that is beyond the length of the
    base's pre-training. All other types turn a row as if it were alone: ``None``.

    Args:
        config: Of a base, from transformers.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kind = str(rope.get("rope_type"))
    if "dynamic" not in kind and kind != "longrope":  # as transformers' dynamic_rope_update asks
        return None
    most: int = config.max_position_embeddings
    return rope.get("original_max_position_embeddings", most) if kind == "longrope" else most


def check_row_length(config: Any, longest: int) -> None:
    """Refuse rows beyond :func:`rope_limit`: they would be trained otherwise in each batch.

    Args:
        config: Of a base, from transformers.
        longest: Tokens of the longest row.

    Raises:
        UserError: It is too long.
    """
    limit = rope_limit(config)
    if limit is not None and longest > limit:
        raise UserError(
            f"This base scales its rotary embedding ({config.rope_parameters['rope_type']}) by the longest row of a "
            f"batch if that has more than {limit:,} tokens, and rows here may have {longest:,}: the same row would "
            f"be trained differently in each batch. Set data.max_length to {limit} or less."
        )
