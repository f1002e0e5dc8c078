import math
import statistics

import pytest
import torch

from qlora_lightning.model.kernels.attention import attends_in
from qlora_lightning.model.kernels.library import load_library
from qlora_lightning.model.layers.attention import flat_attention, lay_out_states
from qlora_lightning.model.layout import Needed, place_samples, whole_samples
from tests.model.layers.written_attention import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    attend,
    draw,
    errors,
    errors_of_torch,
    with_gradients,
)

pytestmark = pytest.mark.skipif(load_library() is None, reason="takes Linux and g++")
in_bfloat16 = pytest.mark.skipif(not attends_in(torch.bfloat16), reason="takes AVX512-BF16")

LENGTHS = (5, 1, 137, 64, 70)  # strips of 8 queries, tiles of 64 and vectors of 16 keys, full and not

# Two samples of 4 and of 70 tokens; the first 3 of the shorter one are computed with the longer one: a stream of 71.
SHARED_LENGTHS = (4, 70)
SHARED = Needed([4, 70], [3, 0], [1, 0])


def ours(lengths, scale=0.3):
    return lambda *qkv: attend_within(whole_samples(lengths), *qkv, scale)


def attend_within(samples, query, key, value, scale):
    return flat_attention(None, query, key, value, None, scale, samples=samples)[0]


def assert_near(ours, exact, error=1e-6):
    for one, other in zip(ours, exact, strict=True):
        assert (one.double() - other).norm() <= error * other.norm() + 1e-12


def draw_exact(lengths):
    """The same numbers as in float32."""
    return [each.detach().double().requires_grad_() for each in draw(lengths, torch.float32)]


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (64,), (65, 65), (700, 3)], ids=str)
def test_output_and_gradients_are_those_of_attention_written_out(lengths):
    found = with_gradients(ours(lengths), draw(lengths, torch.float32))
    assert_near(found, with_gradients(lambda *qkv: attend(*qkv, lengths, 0.3), draw_exact(lengths)))


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 16), (2, 1, 48), (8, 2, 128), (3, 1, 256)])
def test_heads_may_be_as_many_and_as_wide_as_those_of_any_llama(heads, kv_heads, width):
    generator, samples = torch.Generator().manual_seed(0), whole_samples((20, 33))
    shapes = [(1, count, 53, width) for count in (heads, kv_heads, kv_heads)]
    drawn = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    found = with_gradients(lambda *qkv: attend_within(samples, *qkv, width**-0.5), drawn)

    def written_out(query, key, value):
        key, value = (each.repeat_interleave(heads // kv_heads, 1) for each in (key, value))
        parts = zip(*(each.split((20, 33), 2) for each in (query, key, value)), strict=True)
        attend = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([attend(*part, is_causal=True) for part in parts], 2).transpose(1, 2)

    assert_near(found, with_gradients(written_out, [each.detach().double().requires_grad_() for each in drawn]))


def test_what_samples_share_is_looked_up_in_the_stream_and_sums_their_gradients():
    samples = place_samples(SHARED)
    assert samples.whole.places.tolist() == [1, 2, 3, 0, *range(1, 71)]
    stream = [each[:, :, :71].detach().requires_grad_() for each in draw((74,), torch.float32)]
    found = with_gradients(lambda *qkv: attend_within(samples, *qkv, 0.3), stream)

    def in_full(*qkv):
        whole = (lay_out_states(each, samples.whole) for each in qkv)
        mixed = attend(*whole, SHARED_LENGTHS, 0.3)
        return mixed[:, [3, *range(4, 74)]]

    assert_near(found, with_gradients(in_full, [each.detach().double().requires_grad_() for each in stream]))


def test_inputs_may_lie_by_head_or_by_token():
    by_head = draw(LENGTHS, torch.float32)
    by_token = [each.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for each in by_head]
    for one, other in zip(with_gradients(ours(LENGTHS), by_head), with_gradients(ours(LENGTHS), by_token), strict=True):
        assert torch.equal(one, other)


def test_a_token_that_is_not_a_number_spoils_its_own_sample_alone():
    inputs = [each.detach() for each in draw(LENGTHS, torch.float32)]
    for each in inputs:
        each[:, :, 142] = torch.nan  # the last of the third sample
    inputs = [each.requires_grad_() for each in inputs]
    whole = torch.ones(sum(LENGTHS), dtype=torch.bool)
    whole[6:143] = False
    output, *gradients = with_gradients(ours(LENGTHS), inputs)
    assert output[:, whole].isfinite().all()
    assert all(gradient[:, :, whole].isfinite().all() for gradient in gradients)
    assert output[:, 142].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_each_of_them_alone_spoils_what_depends_on_it(which, bad):
    inputs = [each.detach() for each in draw((9,), torch.float32)]
    inputs[which][0, 1, 4, 3] = bad
    inputs = [each.requires_grad_() for each in inputs]
    exact, *_ = with_gradients(lambda *qkv: attend(*qkv, (9,), 0.3), inputs)
    output, *gradients = with_gradients(ours((9,)), inputs)
    assert torch.equal(output.isfinite(), exact.isfinite())
    assert not gradients[1].isfinite().all()


def test_gradients_of_large_scores_are_as_exact_as_torchs():
    query, key, value = draw(LENGTHS, torch.float32)
    inputs = [(query.detach() * 300).requires_grad_(), key, value]
    exact = with_gradients(
        lambda *qkv: attend(*qkv, LENGTHS, 0.3), [each.detach().double().requires_grad_() for each in inputs]
    )
    torchs = with_gradients(lambda *qkv: attend(*qkv, LENGTHS, 0.3), inputs)
    for one, other, truth in zip(with_gradients(ours(LENGTHS), inputs), torchs, exact, strict=True):
        assert (one - truth).norm() <= 1.5 * (other - truth).norm()


@pytest.mark.parametrize("size", [2.0**13, -(2.0**13), 2.0**100])
def test_scores_beyond_the_usual_are_as_in_torch(size):
    query, key, value = (each.detach().round() for each in draw(LENGTHS, torch.float32))  # their products are exact
    exact = attend(query.double() * size, key.double(), value.double(), LENGTHS, 0.25)
    torch.testing.assert_close(ours(LENGTHS, 0.25)(query * size, key, value).double(), exact, rtol=1e-6, atol=1e-6)


def test_queries_keys_values_and_normalizers_of_each_row_are_all_that_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        ours(LENGTHS)(*draw(LENGTHS, torch.float32))
    tokens = sum(LENGTHS)
    keys = KV_HEADS * tokens * HEAD_DIM
    assert kept == [HEADS * tokens * HEAD_DIM, keys, keys, 2 * HEADS * tokens]


@in_bfloat16
@pytest.mark.parametrize("lengths", [LENGTHS, (600,)], ids=str)
@pytest.mark.parametrize("scale", [0.3, 4.0])  # scores of deviation 1 and 16
def test_in_bfloat16_it_errs_no_more_than_torchs_attention_does(scale, lengths):
    found, theirs = errors(ours(lengths, scale), lengths, scale), errors_of_torch(lengths, scale)
    assert (found > 0).all()
    output, *gradients = (found / theirs).tolist()
    assert output <= 1.05
    assert statistics.mean(gradients) <= 1.05


@in_bfloat16
def test_parts_of_a_keys_gradient_are_summed_up_in_float32():
    """256 in the first tile and 1 in each of seven others: in bfloat16 every sum would stay 256."""
    query, key = (torch.zeros(1, heads, 512, HEAD_DIM, dtype=torch.bfloat16) for heads in (HEADS, KV_HEADS))
    value = torch.zeros_like(key).requires_grad_()
    key[:, :, 0] = 1000  # everybody sees the first key alone
    query += 1
    output = ours((512,), 1.0)(query, key, value)
    grad = torch.zeros_like(output)
    grad[0, ::64, ::3] = 1  # the first row of each tile, one query head of each key head
    grad[0, 0] *= 256
    output.backward(grad)
    assert torch.equal(value.grad[0, :, 0], torch.full((KV_HEADS, HEAD_DIM), 264.0, dtype=torch.bfloat16))  # 263


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=in_bfloat16)], ids=str)
def test_results_are_the_same_whatever_the_number_of_threads_and_from_call_to_call(dtype):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(with_gradients(ours(LENGTHS), draw(LENGTHS, dtype)))
    finally:
        torch.set_num_threads(before)
    for found in zip(*results, strict=True):
        assert all(torch.equal(found[0], other) for other in found[1:])
