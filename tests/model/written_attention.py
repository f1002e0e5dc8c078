"""Attention within samples as its formula says, and transformers' own: what ours is held against."""

import itertools
from types import SimpleNamespace

import torch
from transformers.models.llama.modeling_llama import eager_attention_forward

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


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


def error_of_transformers(inputs, lengths, scale):
    """Give the norm of what transformers' attention errs in the dtype of its inputs."""
    module = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, training=False)
    mixed = []
    for sample in zip(*(each.split(lengths, 2) for each in inputs), strict=True):
        mask = torch.zeros(1, dtype=inputs[0].dtype).masked_fill(_later(sample[0].shape[2]), -torch.inf)
        mixed.append(eager_attention_forward(module, *sample, mask, scale)[0])
    exact = attend(*(each.double() for each in inputs), lengths, scale)
    return (torch.cat(mixed, 1) - exact).norm()


def _later(tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(1)


def bounds_of(lengths):
    """Give where samples begin, and the end of the last."""
    return (0, *itertools.accumulate(lengths))
