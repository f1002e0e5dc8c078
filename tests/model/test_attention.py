"""Attention over a packed batch: by every way each sample attends to itself alone, as its formula says."""

import itertools

import pytest
import torch

from qlora_lightning.model.cpu.library import find_function
from qlora_lightning.model.layers import attention
from qlora_lightning.model.layers.attention import PackedPass, packed_attention, packed_pass
from qlora_lightning.model.step.layout import ComputedTokens, bound_sequences, sequences_of_lengths

LENGTHS = (5, 1, 137, 64, 70)  # strips of 8 queries, tiles of 64 and vectors of 16 keys, full and not
BF16 = pytest.mark.skipif(find_function("attend", torch.bfloat16) is None, reason="takes AVX512-BF16")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=BF16)]


def draw(tokens, dtype=torch.float32, heads=(6, 2, 2), width=16):
    """Draw queries, keys and values, ``(1, heads, tokens, width)``."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(1, each, tokens, width, generator=generator, dtype=torch.float64) for each in heads)
    return [each.to(dtype).requires_grad_() for each in drawn]


def by_formula(query, key, value, samples, s_aux=None):
    """Attend within samples in float64, by the formula; what these share is laid out."""
    query, key, value = (each.double()[:, :, samples.expanded.gather_index] for each in (query, key, value))
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    outputs = []
    for start, end in itertools.pairwise(samples.bounds):
        scores = query[:, :, start:end] @ key[:, :, start:end].transpose(2, 3) * query.shape[3] ** -0.5
        scores = scores.masked_fill(torch.ones(end - start, end - start, dtype=torch.bool).triu(1), -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.double().view(1, -1, 1, 1).expand(-1, -1, end - start, -1)], -1)
        outputs.append(scores.softmax(-1)[..., : end - start] @ value[:, :, start:end])
    return torch.cat(outputs, 2).transpose(1, 2)[:, samples.expanded.first_expanded]


def attend_by(*, fast=True, loops=True, ragged_kernel=False, efficient_kernel=False):
    """Make a way to attend: by the C++ loops, the kernels of new and of old cards, or plain."""

    def attend(*qkv, samples, s_aux=None):
        with pytest.MonkeyPatch.context() as patch:
            if not loops:
                patch.setattr(attention, "has_cpu_kernel", lambda *_: False)
            if ragged_kernel:
                patch.setattr(attention, "has_ragged_kernel", lambda query, value: True)
            if efficient_kernel:
                patch.setattr(attention, "has_efficient_kernel", lambda query: True)
            with packed_pass(PackedPass(samples, fused=fast)):
                return packed_attention(None, *qkv, None, s_aux=s_aux)[0]

    return attend


KERNELS = ({"ragged_kernel": True}, {"efficient_kernel": True})
fast, plain, ragged, efficient = (
    attend_by(**each) for each in ({}, {"fast": False}, *({"loops": False, **kernel} for kernel in KERNELS))
)


@pytest.fixture(autouse=True, scope="module")
def kernels_on_a_cpu():
    """Give torch's kernels, which have an implementation for GPUs alone, one for CPUs by the formula."""

    def scores_of(query, key, bounds):
        cu_q, cu_k, max_q, max_k, dropout, is_causal = bounds
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == max(cu_q.diff().tolist())
        assert (dropout, is_causal) == (0.0, True)
        sample = torch.arange(len(cu_q) - 1).repeat_interleave(cu_q.diff())
        scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[2] ** -0.5
        hidden = (sample[:, None] != sample) | torch.ones(len(sample), len(sample), dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf)

    def double(query, key, value):
        assert query.dtype == key.dtype == value.dtype
        repeated = (each.double().repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
        return query.double(), *repeated

    def forward(query, key, value, *bounds, window_size_left, window_size_right):
        assert (window_size_left, window_size_right) == (-1, 0)
        q, k, v = double(query, key, value)
        scores = scores_of(q, k, bounds[:-1])
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(query.dtype)
        return out, scores.logsumexp(-1).float(), *torch.empty(3, 0)

    def backward(grad, query, key, value, out, lse, *bounds, **window):
        (q, k, v), grad = double(query, key, value), grad.double()
        p = torch.exp(scores_of(q, k, bounds[:-2]) - lse.double().unsqueeze(-1))
        grad_p = torch.einsum("qhd,khd->hqk", grad, v)
        grad_scores = p * (grad_p - (grad * out).sum(-1).t().unsqueeze(-1)) * q.shape[2] ** -0.5
        grad_k, grad_v = (torch.einsum("hqk,qhd->khd", *pair) for pair in ((grad_scores, q), (p, grad)))
        grads = torch.einsum("hqk,khd->qhd", grad_scores, k), grad_k, grad_v
        shapes = (each.shape for each in (query, key, value))
        pairs = zip(grads, shapes, strict=True)
        return tuple(each.unflatten(1, (shape[1], -1)).sum(2).to(query.dtype) for each, shape in pairs)

    def efficient_forward(query, key, value, bias, *bounds_and_options, scale=None):
        *bounds, dropout, mask_type, with_lse = bounds_and_options
        assert (bias, with_lse, key.shape[2], value.shape[2]) == (None, True, query.shape[2], query.shape[2])
        states = (each[0] for each in (query, key, value))
        window = {"window_size_left": -1, "window_size_right": 0}
        out, lse, *_ = forward(*states, *bounds, dropout, mask_type == 1, False, **window)
        return out[None], lse, *torch.empty(2, 0), 0, 0

    def efficient_backward(grad, query, key, value, bias, out, *rest, num_splits_key, scale=None):
        *bounds, lse, dropout, seed, offset, mask_type, bias_requires_grad = rest
        assert (bias, bias_requires_grad, num_splits_key) == (None, False, 1)
        states = (each[0] for each in (grad, query, key, value, out))
        grads = backward(*states, lse, *bounds, dropout, mask_type == 1, seed, offset)
        return *(each[None] for each in grads), torch.empty(0)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_efficient_attention_forward", efficient_forward, "CPU")
    library.impl("_efficient_attention_backward", efficient_backward, "CPU")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


def with_gradients(attend, qkv, **options):
    output = attend(*qkv, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad((output * weights).sum(), qkv)]


def errors(found, exact):
    pairs = zip(found, exact, strict=True)
    return torch.tensor([(one - other).detach().norm() / max(other.detach().norm(), 1.0) for one, other in pairs])


MANY = bound_sequences(ComputedTokens(list(LENGTHS), [0] * 5, []))
# The first 3 tokens of a sample of 4 are computed with one of 70: a stream of 71.
SHARING = bound_sequences(ComputedTokens([4, 70], [3, 0], [1, 0]))
SHAPES = [  # samples; heads of queries, keys and values; their width
    (MANY, (6, 2, 2), 16),
    (sequences_of_lengths((1,)), (4, 4, 4), 16),
    (sequences_of_lengths((700, 3)), (2, 1, 1), 48),
    (SHARING, (8, 2, 2), 128),
    (SHARING, (3, 1, 1), 256),
]


WAYS = pytest.mark.parametrize("way", [fast, plain, ragged, efficient], ids=["loops", "plain", "ragged", "efficient"])


@WAYS
@pytest.mark.parametrize(("samples", "heads", "width"), SHAPES)
@pytest.mark.parametrize("sinks", [False, True])
def test_outputs_and_gradients_are_those_of_attention_written_out(way, samples, heads, width, sinks):
    qkv = draw(len(samples.expanded.first_expanded), heads=heads, width=width)
    options = {"samples": samples, "s_aux": torch.linspace(-1, 2, heads[0]) if sinks else None}
    found, exact = (with_gradients(attend, qkv, **options) for attend in (way, by_formula))
    assert errors(found, exact).max() <= 1e-6


@pytest.mark.parametrize(("samples", "heads", "width"), SHAPES)
def test_in_bf16_the_loops_err_no_more_than_torch(samples, heads, width):
    qkv = draw(len(samples.expanded.first_expanded), torch.bfloat16, heads, width)
    loops, torchs, exact = (with_gradients(attend, qkv, samples=samples) for attend in (fast, plain, by_formula))
    assert (errors(loops, exact) <= 1.5 * errors(torchs, exact) + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_in_a_batch_is_bit_equal_to_its_own_alone_whatever_threads_and_layout(dtype):
    qkv, samples = draw(sum(LENGTHS), dtype), sequences_of_lengths(LENGTHS)
    together = with_gradients(fast, qkv, samples=samples)
    for start, end in itertools.pairwise(samples.bounds):
        sample = [each[:, :, start:end].clone() for each in qkv]
        assert torch.equal(together[0][:, start:end], fast(*sample, samples=sequences_of_lengths([end - start])))
    by_token = [each.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for each in qkv]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, together, with_gradients(fast, by_token, samples=samples)))
    finally:
        torch.set_num_threads(before)


def test_what_packed_attention_does_not_compute_is_an_error_and_other_widths_take_no_loops():
    qkv, samples = draw(20), sequences_of_lengths([20])
    for name, argument in {"softcap": 30.0, "is_causal": False}.items():
        message = f"NoneType passes {name} to attention"
        with packed_pass(PackedPass(samples)), pytest.raises(RuntimeError, match=message):
            packed_attention(None, *qkv, None, **{name: argument})
    query, key, _ = draw(20, width=32)
    found, exact = (with_gradients(way, [query, key, qkv[2]], samples=samples) for way in (fast, by_formula))
    assert errors(found, exact).max() <= 1e-6


@WAYS
def test_states_of_a_norm_that_trains_in_float32_are_cast_as_autocast_says(way):
    query, key, value = draw(sum(LENGTHS), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(way, [query, key.detach().float().requires_grad_(), value], samples=MANY)
        expected = with_gradients(way, [query, key, value], samples=MANY)
    assert [each.dtype for each in found] == [torch.bfloat16] * 2 + [torch.float32, torch.bfloat16]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
