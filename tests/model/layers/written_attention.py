"""Attention within samples as its formula says, and torch's own: what ours is held against."""

import itertools

import torch

from qlora_lightning.model.layers.attention import plain_flat_attention

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16


def draw(lengths, dtype=torch.float64):
    """Draw queries, keys and values of samples with so many tokens, ``(1, heads, tokens, head_dim)``."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def attend(query, key, value, lengths, scale):
    """Attend within each sample; give ``(1, tokens, heads, head_dim)``."""
    key, value = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (key, value))
    mixed = []
    for q, k, v in zip(*(each.split(lengths, 2) for each in (query, key, value)), strict=True):
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(_later(q.shape[2]), -torch.inf)
        mixed.append(scores.softmax(-1) @ v)
    return torch.cat(mixed, 2).transpose(1, 2)


def with_gradients(function, inputs):
    """Give the output, and the gradients of the inputs for a drawn gradient of it."""
    output = function(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


def errors(function, lengths, scale):
    """Give the norms of what attention in bfloat16 errs: in its output, and in the gradients of its inputs."""
    inputs = draw(lengths, torch.bfloat16)
    exact = with_gradients(lambda *qkv: attend(*qkv, lengths, scale), [each.double() for each in inputs])
    return torch.stack(
        [(one - other).norm() for one, other in zip(with_gradients(function, inputs), exact, strict=True)]
    )


def errors_of_torch(lengths, scale):
    """Give what torch's attention errs, which keeps scores in float32: the plain path's."""
    bounds = torch.tensor(bounds_of(lengths), dtype=torch.int32)

    def plain(*qkv):
        return plain_flat_attention(None, *qkv, None, scaling=scale, cu_seqlens=bounds)[0]

    return errors(plain, lengths, scale)


def _later(tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(1)


def bounds_of(lengths):
    """Give where samples begin, and the end of the last."""
    return (0, *itertools.accumulate(lengths))
