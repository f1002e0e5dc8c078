"""Causal attention within each sample of a flat batch as plain matrix products, some rows at a time.

On a CPU torch's flash kernel runs at a fraction of the speed of its matrix products. Here the query heads that share a
key head go into one product, a block of rows at a time, so that the scores of a long sample never exist as a whole; its
probabilities are made again in backward (as in Dao et al. 2022, FlashAttention). Those of a short sample are kept. Each
sample's keys are filled up to whole vectors with keys that nobody sees: what is left of a row behind them takes a
softmax as long as many vectors.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_MOST_SCORES = 2**24  # at a time: 32 MiB in bf16
_VECTOR = 32  # numbers of 16 bits that AVX-512 takes at a time
_MOST_ROWS, _FEWEST_ROWS = 320, 16  # of queries at a time
_SHORT = 320  # tokens: up to here the probabilities of a sample take less memory than its other activations


class BlockAttention(torch.autograd.Function):
    """Compute ``softmax(scale · Q Kᵀ + causal) V`` per sample; keeps Q, K and V, and short samples' probabilities."""

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
        heads, kv_heads = query.shape[1], key.shape[1]
        shared, shape = heads // kv_heads, (kv_heads, query.shape[-1])
        bounds_of = (bounds, _fill_up(bounds), _fill_up(bounds))
        packed = [
            _pack(states[0], bounds, filled, kv_heads)
            for states, filled in zip((query, key, value), bounds_of, strict=True)
        ]
        output, kept = torch.empty_like(packed[0]), []
        samples = (
            _samples(each, filled, *shape) for each, filled in zip((*packed, output), (*bounds_of, bounds), strict=True)
        )
        for (start, stop), queries, keys, values, mixed in zip(itertools.pairwise(bounds), *samples, strict=True):
            for first, end in _blocks(stop - start, heads):
                rows, seen = slice(first * shared, end * shared), _whole_vectors(end)
                weights = _probabilities(queries[:, rows], keys[:, :seen], first, shared, scale)
                _multiply_into(mixed[:, rows], weights, values[:, :seen])
                if end - first == stop - start <= _SHORT:
                    kept.append(weights)
        ctx.save_for_backward(*packed, *kept)
        ctx.bounds, ctx.scale, ctx.heads, ctx.shape = bounds, scale, heads, shape
        return _unpack(output, bounds, bounds, heads, *shape)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        saved, kv_heads, bounds = iter(ctx.saved_tensors), ctx.shape[0], ctx.bounds
        packed = [next(saved) for _ in range(3)]
        shared = ctx.heads // kv_heads
        grads = [torch.empty_like(each) for each in packed]
        bounds_of = (bounds, _fill_up(bounds), _fill_up(bounds))
        all_packed = (*packed, _pack(grad[0].transpose(0, 1), bounds, bounds, kv_heads), *grads)
        samples = (
            _samples(each, filled, *ctx.shape)
            for each, filled in zip(all_packed, (*bounds_of, bounds, *bounds_of), strict=True)
        )
        for (start, stop), queries, keys, values, of_mixed, grad_queries, grad_keys, grad_values in zip(
            itertools.pairwise(bounds), *samples, strict=True
        ):
            blocks = list(_blocks(stop - start, ctx.heads))
            # Sums over several blocks are float32.
            sums = [grad_keys, grad_values] if len(blocks) == 1 else [torch.zeros(keys.shape) for _ in range(2)]
            for first, end in blocks:
                rows, seen = slice(first * shared, end * shared), _whole_vectors(end)
                if end - first == stop - start <= _SHORT:
                    weights = next(saved)
                else:
                    weights = _probabilities(queries[:, rows], keys[:, :seen], first, shared, ctx.scale)
                of_weights = torch.bmm(of_mixed[:, rows], values[:, :seen].transpose(1, 2))
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                _multiply_into(grad_queries[:, rows], of_scores, keys[:, :seen])
                for total, left, right in zip(sums, (of_scores, weights), (queries, of_mixed), strict=True):
                    if len(blocks) == 1:
                        torch.bmm(left.transpose(1, 2), right, out=total)
                    else:
                        total[:, :seen] += torch.bmm(left.transpose(1, 2), right[:, rows])
            if len(blocks) > 1:
                grad_keys.copy_(sums[0])
                grad_values.copy_(sums[1])
        for each in grads[:2]:
            each.mul_(ctx.scale)
        heads = (ctx.heads, kv_heads, kv_heads)
        of_query, of_key, of_value = (
            _unpack(each, bounds, filled, number, *ctx.shape).transpose(0, 1)[None]
            for each, filled, number in zip(grads, bounds_of, heads, strict=True)
        )
        return of_query, of_key, of_value, None, None


def _whole_vectors(tokens: int) -> int:
    return -(-tokens // _VECTOR) * _VECTOR


def _fill_up(bounds: Sequence[int]) -> list[int]:
    """Give where samples begin, and the last one ends, that are filled up to whole vectors."""
    return [0, *itertools.accumulate(_whole_vectors(end - start) for start, end in itertools.pairwise(bounds))]


def _multiply_into(result: Tensor, left: Tensor, right: Tensor) -> None:
    if result.is_contiguous():
        torch.bmm(left, right, out=result)
    else:
        result.copy_(torch.bmm(left, right))


def _pack(states: Tensor, bounds: Sequence[int], filled: Sequence[int], kv_heads: int) -> Tensor:
    """Copy ``(heads, tokens, head_dim)`` sample by sample, so that a sample's part of each key head is one matrix.

    Within it a token's query heads lie together; behind its tokens are zeros, if ``filled`` leaves room for them.
    """
    heads, _, head_dim = states.shape
    allocate = states.new_empty if filled == bounds else states.new_zeros
    packed = allocate(heads * filled[-1] * head_dim)
    samples = zip(itertools.pairwise(bounds), _samples(packed, filled, kv_heads, head_dim), strict=True)
    for (start, end), sample in samples:
        by_head = states[:, start:end].view(kv_heads, heads // kv_heads, end - start, head_dim)
        by_token = sample.view(kv_heads, -1, heads // kv_heads, head_dim)
        by_token[:, : end - start].copy_(by_head.transpose(1, 2))
    return packed


def _unpack(
    packed: Tensor, bounds: Sequence[int], filled: Sequence[int], heads: int, kv_heads: int, head_dim: int
) -> Tensor:
    """Give ``(tokens, heads, head_dim)`` again."""
    states = packed.new_empty(bounds[-1], kv_heads, heads // kv_heads, head_dim)
    samples = zip(itertools.pairwise(bounds), _samples(packed, filled, kv_heads, head_dim), strict=True)
    for (start, end), sample in samples:
        by_token = sample.view(kv_heads, -1, heads // kv_heads, head_dim)
        states[start:end] = by_token[:, : end - start].transpose(0, 1)
    return states.view(-1, heads, head_dim)


def _samples(packed: Tensor, filled: Sequence[int], kv_heads: int, head_dim: int) -> Iterator[Tensor]:
    """Give each sample's ``(kv_heads, tokens · heads of a key head, head_dim)``."""
    per_token = len(packed) // filled[-1]
    for start, end in itertools.pairwise(filled):
        yield packed[start * per_token : end * per_token].view(kv_heads, -1, head_dim)


def _blocks(tokens: int, heads: int) -> Iterator[tuple[int, int]]:
    """Give the first row and the end of each block of a sample, in order."""
    rows = max(_FEWEST_ROWS, min(_MOST_ROWS, _MOST_SCORES // (heads * tokens)))
    for first in range(0, tokens, rows):
        yield first, min(first + rows, tokens)


def _probabilities(queries: Tensor, keys: Tensor, before: int, shared: int, scale: float) -> Tensor:
    """Give ``(kv_heads, rows · shared, keys)``; ``before`` keys come before the first row's own."""
    rows = queries.shape[1] // shared
    bias = _causal_bias(queries.dtype, shared)[: rows * shared, : keys.shape[1] - before]
    if before:
        bias = F.pad(bias, (before, 0))
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores)


_biases: dict[tuple[torch.dtype, int], Tensor] = {}


def _causal_bias(dtype: torch.dtype, shared: int) -> Tensor:
    """Give 0 where a key is no later than the row, else minus infinity; of a shorter block it is the corner."""
    if (dtype, shared) not in _biases:
        later = torch.ones(_MOST_ROWS, _MOST_ROWS + _VECTOR, dtype=torch.bool).triu(1)
        bias = torch.zeros(later.shape, dtype=dtype).masked_fill_(later, -torch.inf)
        _biases[dtype, shared] = bias.repeat_interleave(shared, 0)
    return _biases[dtype, shared]
