"""Causal attention within each of many short samples: a tile of rows of all samples at a time.

On a CPU torch's flash kernel runs at a fraction of the speed of its matrix products, and a product for each sample is
too small to fill the machine. Here a tile of rows of every sample, and of all query heads that share a key head, goes
into one batched product with the keys up to the tile's end; scores behind the diagonal hardly exist.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lightning.model.layers.attention_tiles import TILE, Layout
from qlora_lightning.model.layers.causal_bias import causal_bias
from qlora_lightning.model.layers.float32_products import multiply_to_float32

SHORT = 512  # tokens: beyond, what is kept of the probabilities would outgrow a sample's other activations


class ShortAttention(torch.autograd.Function):
    """Compute ``softmax(scale · Q Kᵀ + causal) V`` per sample, keeping Q in tiles, K, V and the probabilities."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        """Attend.

        Args:
            ctx: Of the function.
            query: ``(1, heads, tokens, head_dim)``.
            key: ``(1, kv_heads, tokens, head_dim)``.
            value: Likewise.
            layout: Of the stream of samples.
            scale: Factor on the scores.

        Returns:
            ``(1, tokens, heads, head_dim)``.
        """
        head_dim = query.shape[-1]
        rows = _by_key_head(query, layout).index_select(0, layout.rows)
        keys, values = _spread_keys(layout, key, value)
        mixed, kept = torch.empty_like(rows), []
        by_keys = (layout.split_keys(each, head_dim) for each in (keys, values))
        by_rows = (layout.split_rows(each, head_dim) for each in (rows, mixed))
        for queries, result, seen, seen_values in zip(*by_rows, *by_keys, strict=True):
            weights = _probabilities(queries, seen, scale)
            torch.bmm(weights, seen_values, out=result)
            kept.append(weights)
        ctx.save_for_backward(rows, key, value, *kept)
        ctx.layout, ctx.scale = layout, scale
        return mixed.index_select(0, layout.places).view(query.transpose(1, 2).shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, key, value, *kept = ctx.saved_tensors
        layout, scale, head_dim = ctx.layout, ctx.scale, key.shape[-1]
        keys, values = _spread_keys(layout, key, value)
        # What fills samples up, or is another sample's, has no gradient: so it adds nothing to that of any key.
        grad_mixed = _by_key_head(grad.transpose(1, 2), layout).index_select(0, layout.rows)
        grad_mixed.index_fill_(0, layout.filled, 0)
        grads = [torch.empty_like(each) for each in (rows, keys, values)]
        by_rows = (layout.split_rows(each, head_dim) for each in (rows, grad_mixed, grads[0]))
        by_keys = (layout.split_keys(each, head_dim) for each in (keys, values, *grads[1:]))
        for weights, queries, of_mixed, of_queries, seen, seen_values, of_seen, of_values in zip(
            kept, *by_rows, *by_keys, strict=True
        ):
            of_weights = torch.bmm(of_mixed, seen_values.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            _multiply(of_scores, seen, scale, out=of_queries)
            _multiply(of_scores.transpose(1, 2), queries, scale, out=of_seen)
            torch.bmm(weights.transpose(1, 2), of_mixed, out=of_values)
        of_query = grads[0].index_select(0, layout.places).view(grad.shape).transpose(1, 2)
        places, begins = layout.places_of_keys
        # A key has a part of its gradient in each tile that sees it: they are summed up, in float32.
        of_key, of_value = (
            F.embedding_bag(places, each, begins, mode="sum").view(key.transpose(1, 2).shape).transpose(1, 2)
            for each in grads[1:]
        )
        return of_query, of_key, of_value, None, None


def _spread_keys(layout: Layout, *states: Tensor) -> Iterator[Tensor]:
    """Lay keys and values out in tiles."""
    return (_by_key_head(each, layout).index_select(0, layout.keys) for each in states)


def _by_key_head(states: Tensor, layout: Layout) -> Tensor:
    """Turn ``(1, heads, tokens, head_dim)`` into ``(tokens · kv_heads, …)``: no copy where tokens lie together."""
    return states.transpose(1, 2).reshape(states.shape[2] * layout.kv_heads, -1)


def _probabilities(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Give ``(matrices, rows, keys)``; the keys end with those of the rows' own tile, which see none behind them."""
    scores = multiply_to_float32(queries, keys.transpose(1, 2), scale)
    scores[..., -TILE:].add_(causal_bias(scores.dtype, TILE, TILE, scores.shape[1] // TILE))
    return torch.softmax(scores, -1, out=scores).to(queries.dtype)


def _multiply(left: Tensor, right: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    nothing = left.new_empty(()) if out is None else out
    return torch.baddbmm(nothing, left, right, beta=0, alpha=factor, out=out)
