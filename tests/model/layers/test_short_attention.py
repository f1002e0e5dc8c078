import statistics

import pytest
import torch

from qlora_lightning.model.layers.attention_tiles import Layout
from qlora_lightning.model.layers.short_attention import ShortAttention
from tests.model.layers.written_attention import (
    KV_HEADS,
    attend,
    bounds_of,
    draw,
    errors,
    errors_of_torch,
    with_gradients,
)

LENGTHS = (5, 1, 137, 64, 70)  # three tiles, and one that is just full


def short(lengths, scale=0.3):
    return lambda *qkv: ShortAttention.apply(*qkv, Layout(bounds_of(lengths), KV_HEADS), scale)


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (64,), (65, 65)], ids=str)
def test_output_and_gradients_are_those_of_attention_written_out(lengths):
    ours = with_gradients(short(lengths), draw(lengths))
    theirs = with_gradients(lambda *qkv: attend(*qkv, lengths, 0.3), draw(lengths))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_inputs_may_lie_by_head_or_by_token():
    by_head = draw(LENGTHS)
    by_token = [each.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for each in by_head]
    for one, other in zip(
        with_gradients(short(LENGTHS), by_head), with_gradients(short(LENGTHS), by_token), strict=True
    ):
        assert torch.equal(one, other)


def test_a_token_that_is_not_a_number_spoils_its_own_sample_alone():
    inputs = [each.detach() for each in draw(LENGTHS)]
    for each in inputs:
        each[:, :, 142] = torch.nan  # the last of the third sample
    inputs = [each.requires_grad_() for each in inputs]
    whole = torch.ones(sum(LENGTHS), dtype=torch.bool)
    whole[6:143] = False
    output, *gradients = with_gradients(short(LENGTHS), inputs)
    assert output[:, whole].isfinite().all()
    assert all(gradient[:, :, whole].isfinite().all() for gradient in gradients)
    assert output[:, 142].isnan().all()


def test_q_in_tiles_k_v_and_probabilities_up_to_the_diagonal_are_all_that_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        short(LENGTHS)(*draw(LENGTHS))
    queries, keys = 6 * (5 + 2 + 1) * 64 * 8, 2 * sum(LENGTHS) * 8
    assert kept == [queries, keys, keys, 6 * 5 * 64 * 64, 6 * 2 * 64 * 128, 6 * 64 * 192]


@pytest.mark.parametrize("scale", [0.3, 4.0])  # scores of deviation 1 and 11
def test_in_bfloat16_it_errs_no_more_than_torchs_attention_does(scale):
    ours, theirs = errors(short(LENGTHS, scale), LENGTHS, scale), errors_of_torch(LENGTHS, scale)
    assert (ours > 0).all()
    output, *gradients = (ours / theirs).tolist()
    assert output <= 1.3  # probabilities are rounded after they have been divided by their sum, torch's before
    assert statistics.mean(gradients) <= 1.1


def test_parts_of_a_keys_gradient_are_summed_up_in_float32():
    """256 in the first tile and 1 in each of seven others: in bfloat16 every sum would stay 256."""
    lengths = (512,)
    query, key = torch.zeros(1, 6, 512, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 512, 8, dtype=torch.bfloat16)
    value = torch.zeros_like(key).requires_grad_()
    key[:, :, 0] = 1000  # everybody sees the first key alone
    query += 1
    output = short(lengths, 1.0)(query, key, value)
    grad = torch.zeros_like(output)
    grad[0, ::64, ::3] = 1  # the first row of each tile, one query head of each key head
    grad[0, 0] *= 256
    output.backward(grad)
    assert torch.equal(value.grad[0, :, 0], torch.full((2, 8), 264.0, dtype=torch.bfloat16))  # 263, rounded once
