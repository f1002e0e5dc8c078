"""Lays states of a stream that has shared beginnings once out for every token of its samples."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lightning.model.layers.autograd import apply


def sort_by_place(places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Give the tokens of the samples by their place in the stream, and where those of each of its places begin.

    Args:
        places: Where in the stream each token is, ``(tokens of samples,)``.
        count: Tokens of the stream; each has a place.
    """
    in_stream, order = places.sort(stable=True)
    return order, torch.searchsorted(in_stream, torch.arange(count, device=places.device))


def lay_out_samples(states: Tensor, places: Tensor, order: Tensor, begins: Tensor) -> Tensor:
    """Lay states ``(1, heads, tokens, head_dim)`` of a stream out for all tokens of its samples.

    Args:
        states: Of the stream.
        places: Where in it the tokens are.
        order: As :func:`sort_by_place` gives it.
        begins: Likewise.
    """
    return cast(Tensor, apply(_LayOut, states, places, order, begins))


class _LayOut(torch.autograd.Function):
    """``states[:, :, places]``; gradients of one token in several samples are summed up in float32, in their order.

    The backward of an index would add them up in any order on CUDA, and round after each.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor, order: Tensor, begins: Tensor) -> Tensor:
        ctx.save_for_backward(order, begins)
        return states.index_select(2, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        order, begins = ctx.saved_tensors
        _, heads, tokens, head_dim = grad.shape
        by_token = grad.transpose(1, 2).reshape(tokens, -1)
        summed = F.embedding_bag(order, by_token, begins, mode="sum")
        return summed.view(1, len(begins), heads, head_dim).transpose(1, 2), None, None, None
