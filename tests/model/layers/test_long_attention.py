import statistics

import pytest
import torch

from qlora_lightning.model.layers import long_attention
from qlora_lightning.model.layers.long_attention import LongAttention, blocks
from tests.model.layers.written_attention import attend, draw, errors, errors_of_torch, with_gradients

HEADS, TOKENS = 6, 37


@pytest.fixture(params=[320, 16, 7])
def rows(request, monkeypatch):
    """Rows of a block: all of the sample at once, or several blocks."""
    monkeypatch.setattr(long_attention, "_MOST_ROWS", request.param)
    monkeypatch.setattr(long_attention, "_FEWEST_ROWS", 1)
    return request.param


@pytest.mark.usefixtures("rows")
def test_output_and_gradients_are_those_of_attention_written_out():
    ours = with_gradients(lambda *qkv: LongAttention.apply(*qkv, 0.3), draw((TOKENS,)))
    theirs = with_gradients(lambda *qkv: attend(*qkv, (TOKENS,), 0.3), draw((TOKENS,)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # sums over blocks are float32


def test_blocks_grow_shorter_as_samples_grow_longer():
    assert list(blocks(800, heads=4)) == [(0, 320), (320, 640), (640, 800)]
    long = list(blocks(32_768, heads=32))
    assert {end - first for first, end in long} == {16}
    assert long_attention._MOST_SCORES == 16 * 32 * 32_768


def test_q_k_and_v_are_all_that_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        LongAttention.apply(*draw((TOKENS,)), 0.3)
    keys = 2 * 64 * 8  # filled up to whole vectors
    assert kept == [HEADS * TOKENS * 8, keys, keys]


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("scale", [0.3, 4.0])  # scores of deviation 1 and 11
def test_in_bfloat16_it_errs_no_more_than_torchs_attention_does(scale):
    ours = errors(lambda *qkv: LongAttention.apply(*qkv, scale), (TOKENS,), scale)
    theirs = errors_of_torch((TOKENS,), scale)
    assert (ours > 0).all()
    output, *gradients = (ours / theirs).tolist()
    assert output <= 1.3  # probabilities are rounded after they have been divided by their sum, torch's before
    assert statistics.mean(gradients) <= 1.1
