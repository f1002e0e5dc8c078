import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_lightning.model.kernels import loops
from qlora_lightning.model.kernels.library import load_library
from qlora_lightning.model.layers.elementwise import Rotary, normalize, normalize_again, normalize_backward, swiglu

pytestmark = pytest.mark.skipif(load_library() is None, reason="takes Linux and g++")

ERRORS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # relative to the largest number
EPS = 1e-5


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def draw(*shape, dtype):
    return torch.randn(*shape, generator=draw.generator).to(dtype)


@pytest.fixture(autouse=True)
def seed():
    draw.generator = torch.Generator().manual_seed(0)


def assert_near(ours, exact, dtype):
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().max() <= ERRORS[dtype] * exact.abs().max()


@pytest.mark.parametrize(("rows", "width"), [(1, 5), (5, 7), (33, 64), (200, 576)])
def test_a_norm_and_its_gradient_are_those_of_torch_in_float64(rows, width, dtype):
    x, weight, grad = (draw(*shape, dtype=dtype) for shape in ((rows, width), (width,), (rows, width)))
    assert loops.can_run(x, weight)
    exact_x = x.double().requires_grad_()
    exact = F.rms_norm(exact_x, (width,), weight.double(), EPS)
    normed, inverse = normalize(x, weight, EPS)
    assert torch.equal(normalize_again(x, weight, inverse), normed)
    assert_near(normed, exact.detach(), dtype)
    (exact_grad,) = torch.autograd.grad((exact * grad.double()).sum(), exact_x)
    assert_near(normalize_backward(grad.clone(), x, weight, inverse), exact_grad, dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 1536)])
def test_swiglu_and_its_gradients_are_those_of_torch_in_float64(shape, dtype):
    gate, up, grad = (draw(*shape, dtype=dtype) for _ in range(3))
    gate = gate * 5  # also where the sigmoid is flat
    exact_gate, exact_up = (each.double().requires_grad_() for each in (gate, up))
    exact = F.silu(exact_gate) * exact_up
    exact_grads = torch.autograd.grad((exact * grad.double()).sum(), (exact_gate, exact_up))
    assert_near(loops.swiglu(gate, up), exact.detach(), dtype)
    hidden, grad_gate, grad_up = loops.swiglu_backward(gate, up, given := grad.clone())
    assert grad_gate is given
    assert torch.equal(hidden, loops.swiglu(gate, up))
    for ours, expected in zip((grad_gate, grad_up), exact_grads, strict=True):
        assert_near(ours, expected, dtype)


def test_rotary_embedding_and_its_gradient_are_those_of_torch_in_float64(dtype, monkeypatch):
    angles = draw(1, 9, 8, dtype=torch.float32)  # the two halves differ, as no model's do
    states, grad = (draw(1, 9, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(2))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    ran, rotate = [], loops.rotate
    monkeypatch.setattr(loops, "rotate", lambda *args, **options: ran.append(1) or rotate(*args, **options))
    turned, again = Rotary.apply(states, states, cos, sin)
    assert torch.equal(turned, again)
    (ours,) = torch.autograd.grad((turned, again), states, (grad, torch.zeros_like(grad)))
    assert len(ran) == 4
    assert turned.stride() == ours.stride() == states.stride()
    exact_states = states.detach().double().requires_grad_()
    exact, _ = Rotary.apply(exact_states, exact_states.detach(), cos.double(), sin.double())
    assert_near(turned.detach(), exact.detach(), dtype)
    assert_near(ours, torch.autograd.grad(exact, exact_states, grad.double())[0], dtype)


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even():
    numbers = torch.arange(0x3F80, 0x3FC0, dtype=torch.int16).view(torch.bfloat16)
    one, many = torch.ones(64, dtype=torch.bfloat16), torch.tensor([1.0, 1.5, 1.25, 1.125]).to(torch.bfloat16)
    angles = numbers[:, None].expand(64, 2).contiguous()
    for factor in many:
        states = (one * factor)[:, None, None].expand(64, 1, 2).contiguous()
        turned = loops.rotate(states, angles, torch.zeros_like(angles), back=False)
        assert torch.equal(turned[:, 0, 0], numbers * factor)


@pytest.mark.parametrize("number", [math.nan, 1e30, -1e30, 100.0, -100.0, 0.0])
def test_numbers_beyond_the_usual_come_out_as_from_torch(number, dtype):
    gate, up = torch.full((1, 40), number, dtype=dtype), torch.full((1, 40), 0.5, dtype=dtype)
    expected = F.silu(gate.double()) * 0.5
    torch.testing.assert_close(loops.swiglu(gate, up).double(), expected, rtol=1e-2, atol=1e-30, equal_nan=True)
    hidden, grad_gate, grad_up = loops.swiglu_backward(gate, up, torch.ones_like(gate))
    exact = gate.double().requires_grad_()
    (exact_grad,) = torch.autograd.grad((F.silu(exact) * 0.5).sum(), exact)
    torch.testing.assert_close(hidden.double(), expected, rtol=1e-2, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(grad_gate.double(), exact_grad, rtol=1e-2, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(grad_up.double(), F.silu(gate.double()), rtol=1e-2, atol=1e-30, equal_nan=True)


def test_one_number_that_is_none_spoils_its_row_alone(dtype):
    x, weight = draw(3, 40, dtype=dtype), torch.ones(40, dtype=dtype)
    x[1, 5] = math.nan
    normed, inverse = normalize(x, weight, EPS)
    assert normed.isnan().all(-1).tolist() == [False, True, False]
    grad = loops.normalize_backward(torch.ones_like(x), x, weight, inverse)
    assert grad.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 50), (3, 4096), (7, 10000)])
def test_cross_entropy_and_its_gradient_are_those_of_torch_in_float64(rows, vocabulary, dtype):
    logits = (20 * draw(rows, vocabulary, dtype=dtype)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=draw.generator)
    targets[0] = logits[0].argmax()
    exact_logits = logits.double().requires_grad_()
    exact = F.cross_entropy(exact_logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum(), exact_logits)
    before = logits.clone()
    for with_gradient in (False, True):
        nll, correct = loops.cross_entropy(logits, targets, with_gradient)
        torch.testing.assert_close(nll.double(), exact.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(correct, before.argmax(-1) == targets)
        if not with_gradient:
            assert torch.equal(logits, before)
    assert_near(logits, gradient, dtype)


def test_of_equal_logits_the_first_is_the_prediction(dtype):
    logits = torch.tensor([[1.0, 3, 3], [1, 3, 3], [3, 1, 2]], dtype=dtype)
    assert loops.cross_entropy(logits, torch.tensor([1, 2, 2]), False)[1].tolist() == [True, False, False]


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_a_logit_that_is_no_number_spoils_its_row_alone(spoilt, dtype):
    logits = draw(3, 40, dtype=dtype)
    logits[1, 7] = spoilt
    nll, _ = loops.cross_entropy(logits, torch.tensor([0, 1, 2]), True)
    assert nll.isfinite().tolist() == [True, False, True]
    assert logits.isfinite().all(1).tolist() == [True, False, True]


def test_what_the_loops_do_not_know_goes_torchs_way():
    x = torch.randn(4, 8)
    assert loops.can_run(x, nn.Parameter(torch.ones(8)))
    assert not loops.can_run(x.double())
    assert not loops.can_run(x.half())
    assert not loops.can_run(x, torch.ones(8, dtype=torch.bfloat16))
    assert not loops.can_run(x.t())
    assert not loops.can_run(x.to("meta"))


def test_an_empty_stream_has_no_numbers(dtype):
    x, weight = torch.empty(0, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    assert normalize(x, weight, EPS)[0].shape == (0, 8)
    assert swiglu(x, x).shape == (0, 8)


def test_results_are_the_same_whatever_the_number_of_threads(dtype):
    x, weight = draw(50, 576, dtype=dtype), draw(576, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            normed, inverse = normalize(x, weight, EPS)
            of_x = normalize_backward(x.clone(), x, weight, inverse)
            results.append((normed, inverse, of_x, loops.swiglu(x, normed)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [-1, 10, 17])
def test_a_target_that_is_not_in_the_vocabulary_is_refused(bad, dtype):
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds: the vocabulary has 10 tokens"):
        loops.cross_entropy(torch.zeros(2, 10, dtype=dtype), torch.tensor([3, bad]), True)


def test_targets_may_be_of_any_integers(dtype):
    logits = torch.randn(2, 10, dtype=dtype)
    losses = [
        loops.cross_entropy(logits.clone(), torch.tensor([3, 9], dtype=kind), False)[0]
        for kind in (torch.int64, torch.int32)
    ]
    assert torch.equal(*losses)


def test_the_default_dtype_does_not_matter(dtype):
    logits, x = torch.randn(2, 10).to(dtype), torch.randn(3, 32).to(dtype)

    def results():
        return [*loops.cross_entropy(logits.clone(), torch.tensor([3, 9]), True), *loops.normalize(x, x[0], 1e-5)]

    expected = results()
    for other in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(other)
        try:
            found = results()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
