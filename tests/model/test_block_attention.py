import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import eager_attention_forward

from qlora_lightning.model import block_attention
from qlora_lightning.model.block_attention import BlockAttention

HEADS, KV_HEADS, WIDTH = 6, 2, 8
LENGTHS = (5, 1, 37, 20)
BOUNDS = [0, *itertools.accumulate(LENGTHS)]


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_hand(query, key, value, scale):
    key, value = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (key, value))
    mixed = []
    for start, end in itertools.pairwise(BOUNDS):
        q, k, v = (each[:, :, start:end] for each in (query, key, value))
        later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        mixed.append((q @ k.transpose(2, 3) * scale).masked_fill(later, -torch.inf).softmax(-1) @ v)
    return torch.cat(mixed, 2).transpose(1, 2)


def with_gradients(attend, inputs):
    output = attend(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


@pytest.fixture(params=[320, 16, 7])
def rows(request, monkeypatch):
    """Rows of a block: all of a sample at once, or several blocks."""
    monkeypatch.setattr(block_attention, "_MOST_ROWS", request.param)
    monkeypatch.setattr(block_attention, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(block_attention, "_SHORT", min(request.param, 19))
    monkeypatch.setattr(block_attention, "_biases", {})
    return request.param


def test_output_and_gradients_are_those_of_attention_written_out(rows):
    ours = with_gradients(lambda *qkv: BlockAttention.apply(*qkv, BOUNDS, 0.3), draw())
    theirs = with_gradients(lambda *qkv: by_hand(*qkv, 0.3), draw())
    tolerance = 1e-12 if rows == 320 else 1e-6  # sums over blocks are float32
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_blocks_grow_shorter_as_samples_grow_longer():
    assert list(block_attention._blocks(300, heads=4)) == [(0, 300)]
    assert list(block_attention._blocks(800, heads=4)) == [(0, 320), (320, 640), (640, 800)]
    long = list(block_attention._blocks(32_768, heads=32))
    assert {end - first for first, end in long} == {16}
    assert block_attention._MOST_SCORES == 16 * 32 * 32_768


def test_q_k_v_and_the_probabilities_of_short_samples_are_all_that_is_kept(monkeypatch):
    monkeypatch.setattr(block_attention, "_SHORT", 20)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        BlockAttention.apply(*draw(), BOUNDS, 0.3)
    keys = KV_HEADS * (32 + 32 + 64 + 32) * WIDTH  # filled up to whole vectors, as the probabilities of a query
    assert kept == [HEADS * sum(LENGTHS) * WIDTH, keys, keys, *(HEADS * length * 32 for length in (5, 1, 20))]


def test_in_bfloat16_it_errs_no_more_than_transformers_attention_does():
    inputs = [each.detach() for each in draw(torch.bfloat16)]
    exact = by_hand(*(each.double() for each in inputs), 0.3)
    module = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, training=False)
    theirs = []
    for start, end in itertools.pairwise(BOUNDS):
        later = torch.full((end - start, end - start), -torch.inf, dtype=torch.bfloat16).triu(1)
        sample = [each[:, :, start:end] for each in inputs]
        theirs.append(eager_attention_forward(module, *sample, later, 0.3)[0])
    error, their_error = (
        (mixed - exact).norm() for mixed in (BlockAttention.apply(*inputs, BOUNDS, 0.3), torch.cat(theirs, 1))
    )
    assert 0 < error <= 1.1 * their_error
