"""Causal attention within each sample of a flat batch as plain matrix products, some rows at a time.

On a CPU torch's flash kernel runs at a fraction of the speed of its matrix products. Here the query heads that share a
key head go into one product, a block of rows at a time, so that the scores of a long sample never exist as a whole; the
probabilities are made again in backward (as in Dao et al. 2022, FlashAttention).
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_MOST_SCORES = 2**24  # at a time: 32 MiB in bf16
_MOST_ROWS, _FEWEST_ROWS = 512, 16  # of queries at a time


class BlockAttention(torch.autograd.Function):
    """Compute ``softmax(scale · Q Kᵀ + causal) V`` per sample; keeps Q, K and V only."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int], scale: float) -> Tensor:
        """Attend.

        Args:
            ctx: Of the function.
            query: ``(1, heads, tokens, head_dim)``.
            key: ``(1, kv_heads, tokens, head_dim)``.
            value: Likewise.
            bounds: Where samples begin, and the end of the last.
            scale: Factor on the scores.

        Returns:
            ``(1, tokens, heads, head_dim)``.
        """
        _, heads, tokens, _ = query.shape
        kv_heads = key.shape[1]
        queries, keys, values = _group(query[0], kv_heads), key[0].contiguous(), value[0].contiguous()
        output, shared = torch.empty_like(queries), heads // kv_heads
        for start, first, end in _blocks(bounds, heads):
            rows, seen = slice(first * shared, end * shared), slice(start, end)
            weights = _probabilities(queries[:, rows], keys[:, seen], first - start, shared, scale)
            output[:, rows] = torch.bmm(weights, values[:, seen])
        ctx.save_for_backward(queries, keys, values)
        ctx.bounds, ctx.scale, ctx.heads = bounds, scale, heads
        return output.view(kv_heads, tokens, shared, -1).transpose(0, 1).reshape(1, tokens, heads, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries, keys, values = ctx.saved_tensors
        kv_heads, tokens, _ = keys.shape
        shared = ctx.heads // kv_heads
        grad = _group(grad[0].transpose(0, 1), kv_heads)
        grad_queries = torch.empty_like(queries)
        grad_keys, grad_values = (torch.empty_like(keys) for _ in range(2))
        for start, blocks in itertools.groupby(_blocks(ctx.bounds, ctx.heads), key=lambda block: block[0]):
            sums: tuple[Tensor, Tensor] | None = None  # of keys and values, over the blocks of a sample
            for _, first, end in reversed(list(blocks)):  # the last block sees all keys
                rows, seen = slice(first * shared, end * shared), slice(start, end)
                of_output, of_queries = grad[:, rows], queries[:, rows]
                weights = _probabilities(of_queries, keys[:, seen], first - start, shared, ctx.scale)
                of_weights = torch.bmm(of_output, values[:, seen].transpose(1, 2))
                of_values = torch.bmm(weights.transpose(1, 2), of_output)
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                grad_queries[:, rows] = torch.bmm(of_scores, keys[:, seen])
                of_keys = torch.bmm(of_scores.transpose(1, 2), of_queries)
                if sums is None:  # in float32 where there are several
                    whole = (of_keys, of_values)
                    sums = whole if first == start else (of_keys.float(), of_values.float())
                    sample = seen
                else:
                    for total, part in zip(sums, (of_keys, of_values), strict=True):
                        total[:, : end - start] += part
            if sums is not None:
                grad_keys[:, sample], grad_values[:, sample] = sums
        grad_queries = grad_queries.mul_(ctx.scale).view(kv_heads, tokens, shared, -1)
        grad_queries = grad_queries.transpose(1, 2).reshape(1, ctx.heads, tokens, -1)
        return grad_queries, grad_keys.mul_(ctx.scale)[None], grad_values[None], None, None


def _group(states: Tensor, kv_heads: int) -> Tensor:
    """Lay ``(heads, tokens, head_dim)`` out as ``(kv_heads, tokens · shared, head_dim)``, a token's heads together."""
    heads, tokens, head_dim = states.shape
    return states.view(kv_heads, heads // kv_heads, tokens, head_dim).transpose(1, 2).reshape(kv_heads, -1, head_dim)


def _blocks(bounds: Sequence[int], heads: int) -> Iterator[tuple[int, int, int]]:
    """Give ``(sample's start, block's first row, block's end)``, in order."""
    for start, end in itertools.pairwise(bounds):
        most = _MOST_SCORES // (heads * (end - start))
        rows = max(_FEWEST_ROWS, min(_MOST_ROWS, most))
        for first in range(start, end, rows):
            yield start, first, min(first + rows, end)


def _probabilities(queries: Tensor, keys: Tensor, before: int, shared: int, scale: float) -> Tensor:
    """Give ``(kv_heads, rows · shared, keys)``; ``before`` keys come before the first row's own."""
    scores = queries.new_empty(*queries.shape[:2], keys.shape[1])
    scores[:, :, :before] = 0
    rows = queries.shape[1] // shared
    scores[:, :, before:] = _causal_bias(queries.dtype, shared)[: rows * shared, :rows]
    scores.baddbmm_(queries, keys.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores)


_biases: dict[tuple[torch.dtype, int], Tensor] = {}


def _causal_bias(dtype: torch.dtype, shared: int) -> Tensor:
    """Give 0 where a key is no later than the row, else minus infinity; of a shorter block it is the corner."""
    if (dtype, shared) not in _biases:
        later = torch.ones(_MOST_ROWS, _MOST_ROWS, dtype=torch.bool).triu(1)
        bias = torch.zeros(_MOST_ROWS, _MOST_ROWS, dtype=dtype).masked_fill_(later, -torch.inf)
        _biases[dtype, shared] = bias.repeat_interleave(shared, 0)
    return _biases[dtype, shared]
