"""Causal attention within one long sample as plain matrix products, a block of rows at a time.

On a CPU torch's flash kernel runs at a fraction of the speed of its matrix products. Here the query heads that share a
key head go into one product, a block of rows at a time, so that the scores of the sample never exist as a whole; its
probabilities are made again in backward (as in Dao et al. 2022, FlashAttention). The sample's keys are filled up to
whole vectors with keys that nobody sees: what is left of a row behind them takes a softmax as long as many vectors.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lightning.model.layers.causal_bias import causal_bias
from qlora_lightning.model.layers.float32_products import multiply_to_float32

_MOST_SCORES = 2**24  # at a time: 64 MiB in float32
_VECTOR = 32  # numbers of 16 bits that AVX-512 takes at a time
_MOST_ROWS, _FEWEST_ROWS = 320, 16  # of queries at a time


class LongAttention(torch.autograd.Function):
    """Compute ``softmax(scale · Q Kᵀ + causal) V``, keeping Q, K and V for backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend.

        Args:
            ctx: Of the function.
            query: ``(1, heads, tokens, head_dim)``.
            key: ``(1, kv_heads, tokens, head_dim)``.
            value: Likewise.
            scale: Factor on the scores.

        Returns:
            ``(1, tokens, heads, head_dim)``.
        """
        (_, heads, tokens, _), kv_heads = query.shape, key.shape[1]
        shared = heads // kv_heads
        queries, keys, values = _by_key_head(query, kv_heads), _fill_up(key), _fill_up(value)
        mixed = torch.empty_like(queries)
        for first, end in blocks(tokens, heads):
            rows, seen = slice(first * shared, end * shared), whole_vectors(end)
            weights = _probabilities(queries[:, rows], keys[:, :seen], first, shared, scale)
            mixed[:, rows] = torch.bmm(weights, values[:, :seen])
        ctx.save_for_backward(queries, keys, values)
        ctx.scale, ctx.heads, ctx.tokens = scale, heads, tokens
        return _by_token(mixed, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (queries, keys, values), scale, tokens = ctx.saved_tensors, ctx.scale, ctx.tokens
        kv_heads = len(keys)
        shared = ctx.heads // kv_heads
        grad_mixed = _by_key_head(grad.transpose(1, 2), kv_heads)
        of_query = torch.empty_like(queries)
        of_key, of_value = (torch.zeros(each.shape) for each in (keys, values))  # sums over blocks are float32
        for first, end in blocks(tokens, ctx.heads):
            rows, seen = slice(first * shared, end * shared), whole_vectors(end)
            weights = _probabilities(queries[:, rows], keys[:, :seen], first, shared, scale)
            of_weights = torch.bmm(grad_mixed[:, rows], values[:, :seen].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query[:, rows] = torch.bmm(of_scores, keys[:, :seen])
            of_key[:, :seen] += torch.bmm(of_scores.transpose(1, 2), queries[:, rows])
            of_value[:, :seen] += torch.bmm(weights.transpose(1, 2), grad_mixed[:, rows])
        of_key, of_value = (each[None, :, :tokens].to(grad.dtype) for each in (of_key.mul_(scale), of_value))
        return _by_token(of_query.mul_(scale), tokens).transpose(1, 2), of_key, of_value, None


def whole_vectors(tokens: int) -> int:
    """Give how many keys there are room for, so that they are whole vectors."""
    return -(-tokens // _VECTOR) * _VECTOR


def blocks(tokens: int, heads: int) -> Iterator[tuple[int, int]]:
    """Give the first row and the end of each block of a sample, in order."""
    rows = max(_FEWEST_ROWS, min(_MOST_ROWS, _MOST_SCORES // (heads * tokens)))
    for first in range(0, tokens, rows):
        yield first, min(first + rows, tokens)


def _by_key_head(states: Tensor, kv_heads: int) -> Tensor:
    """Turn ``(1, heads, tokens, head_dim)`` into ``(kv_heads, tokens · heads of a key head, head_dim)``."""
    _, heads, tokens, head_dim = states.shape
    by_token = states.view(kv_heads, heads // kv_heads, tokens, head_dim).transpose(1, 2)
    return by_token.reshape(kv_heads, -1, head_dim)


def _by_token(states: Tensor, tokens: int) -> Tensor:
    """Turn it back, to ``(1, tokens, heads, head_dim)``."""
    kv_heads, _, head_dim = states.shape
    return states.view(kv_heads, tokens, -1, head_dim).transpose(0, 1).reshape(1, tokens, -1, head_dim)


def _fill_up(states: Tensor) -> Tensor:
    """Copy ``(1, kv_heads, tokens, head_dim)``, zeros behind its tokens."""
    tokens = states.shape[2]
    return F.pad(states[0], (0, 0, 0, whole_vectors(tokens) - tokens)).contiguous()


def _probabilities(queries: Tensor, keys: Tensor, before: int, shared: int, scale: float) -> Tensor:
    """Give ``(kv_heads, rows · shared, keys)``; ``before`` keys come before the first row's own."""
    rows = queries.shape[1] // shared
    scores = multiply_to_float32(queries, keys.transpose(1, 2), scale)
    bias = causal_bias(scores.dtype, _MOST_ROWS, _MOST_ROWS + _VECTOR, shared)
    scores[..., before:].add_(bias[: rows * shared, : keys.shape[1] - before])  # of a shorter block it is the corner
    return torch.softmax(scores, -1, out=scores).to(queries.dtype)
