"""The C++ for a CPU computes what torch does in float64, rounded once, whatever the number of threads."""

import logging
import math
import subprocess

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_lightning.base.cache import list_entries
from qlora_lightning.model.cpu import library, loops
from qlora_lightning.model.cpu.library import load_library
from qlora_lightning.model.layers import elementwise
from qlora_lightning.model.layers.elementwise import Rotary, rms_norm, rms_norm_backward, swiglu

pytestmark = pytest.mark.skipif(load_library() is None, reason="takes Linux and g++")

ERRORS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # relative to the largest number
EPS = 1e-5


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    draw.generator = torch.Generator().manual_seed(0)


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=draw.generator).to(dtype)


def assert_near(ours, exact, dtype):
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().max() <= ERRORS[dtype] * exact.abs().max()


@pytest.mark.parametrize(("rows", "width"), [(1, 5), (5, 7), (200, 576)])
def test_a_norm_and_its_gradient(rows, width, dtype):
    x, weight, grad = (draw(*shape, dtype=dtype) for shape in ((rows, width), (width,), (rows, width)))
    exact_x = x.double().requires_grad_()
    exact = F.rms_norm(exact_x, (width,), weight.double(), EPS)
    normed, inverse = rms_norm(x, weight, EPS)
    assert_near(normed, exact.detach(), dtype)
    (exact_grad,) = torch.autograd.grad((exact * grad.double()).sum(), exact_x)
    assert_near(rms_norm_backward(grad.clone(), x, weight, inverse), exact_grad, dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 1536)])
def test_swiglu_and_its_gradients(shape, dtype):
    gate, up, grad = (draw(*shape, dtype=dtype) for _ in range(3))
    gate = gate * 5  # also where the sigmoid is flat
    exact_gate, exact_up = (each.double().requires_grad_() for each in (gate, up))
    exact = F.silu(exact_gate) * exact_up
    exact_grads = torch.autograd.grad((exact * grad.double()).sum(), (exact_gate, exact_up))
    hidden, *grads = loops.swiglu_backward(gate, up, grad)
    assert torch.equal(hidden, swiglu(gate, up))
    for ours, theirs in zip([hidden, *grads], [exact.detach(), *exact_grads], strict=True):
        assert_near(ours, theirs, dtype)


@pytest.mark.parametrize("number", [math.nan, 1e30, -1e30, 100.0, -100.0, 0.0])
def test_numbers_beyond_the_usual_come_out_of_swiglu_as_from_torch(number, dtype):
    gate, up = torch.full((1, 40), number, dtype=dtype), torch.full((1, 40), 0.5, dtype=dtype)
    exact = gate.double().requires_grad_()
    (exact_grad,) = torch.autograd.grad((F.silu(exact) * 0.5).sum(), exact)
    expected = F.silu(gate.double()) * 0.5, exact_grad, F.silu(gate.double())
    for ours, theirs in zip(loops.swiglu_backward(gate, up, torch.ones_like(gate)), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-30, equal_nan=True)


def test_rotary_embedding_and_its_gradient(dtype):
    angles = draw(1, 9, 8, dtype=torch.float32)  # the two halves differ, as no model's do
    states, grad = (draw(1, 9, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(2))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    query, key = Rotary.apply(states, states, cos, sin)
    assert torch.equal(query, key)
    (ours,) = torch.autograd.grad((query, key), states, (grad, torch.zeros_like(grad)))
    assert query.stride() == ours.stride() == states.stride()
    exact_states = states.detach().double().requires_grad_()
    swapped = torch.cat([-exact_states[..., 4:], exact_states[..., :4]], -1)
    exact = exact_states * cos.double() + swapped * sin.double()
    assert_near(query.detach(), exact.detach(), dtype)
    assert_near(ours, torch.autograd.grad(exact, exact_states, grad.double())[0], dtype)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 50), (7, 10000)])
def test_cross_entropy_and_its_gradient(rows, vocabulary, dtype):
    logits = (20 * draw(rows, vocabulary, dtype=dtype)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=draw.generator)
    targets[0] = logits[0].argmax()
    exact_logits, before = logits.double().requires_grad_(), logits.clone()
    exact = F.cross_entropy(exact_logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum(), exact_logits)
    for with_gradient in (False, True):
        assert torch.equal(logits, before)
        nll, correct = loops.cross_entropy(logits, targets.to(torch.int32), with_gradient)
        torch.testing.assert_close(nll.double(), exact.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(correct, before.argmax(-1) == targets)
    assert_near(logits, gradient, dtype)


def test_of_equal_logits_the_first_is_the_prediction_and_a_target_beyond_the_vocabulary_is_refused(dtype):
    logits = torch.tensor([[1.0, 3, 3], [1, 3, 3], [3, 1, 2]], dtype=dtype)
    assert loops.cross_entropy(logits, torch.tensor([1, 2, 2]), False)[1].tolist() == [True, False, False]
    for bad in (-1, 3):
        with pytest.raises(IndexError, match="not in the vocabulary of 3 tokens"):
            loops.cross_entropy(logits, torch.tensor([0, 0, bad]), True)


def test_a_nan_spoils_its_row_alone(dtype):
    x, weight = draw(3, 40, dtype=dtype), torch.ones(40, dtype=dtype)
    x[1, 5] = math.nan
    normed, inverse = rms_norm(x, weight, EPS)
    grad = loops.rms_norm_backward(torch.ones_like(x), x, weight, inverse)
    nll, _ = loops.cross_entropy(x, torch.tensor([0, 1, 2]), True)
    for found in (normed.isnan().all(-1), grad.isnan().all(-1), nll.isnan(), x.isnan().all(-1)):
        assert found.tolist() == [False, True, False]


def test_loops_are_the_same_on_any_threads(dtype):
    x, weight = draw(50, 576, dtype=dtype), draw(576, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            normed, inverse = rms_norm(x, weight, EPS)
            grad_x = rms_norm_backward(x.clone(), x, weight, inverse)
            losses = loops.cross_entropy(x.clone(), torch.arange(50), True)
            results.append([normed, inverse, grad_x, swiglu(x, normed), *losses])
    finally:
        torch.set_num_threads(before)
    for found in zip(*results, strict=True):
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_the_loops_do_not_know_goes_torchs_way():
    x, ones = torch.randn(4, 8), torch.ones(8)
    assert loops.can_run(x, nn.Parameter(ones))
    for others in ([x.double()], [x.half()], [x, ones.bfloat16()], [x.t()], [x.to("meta")]):
        assert not loops.can_run(*others)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of what its own compiler does
@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward"])
def test_compiled_as_a_gpu_runs_them_they_give_the_same_numbers_and_are_compiled_once_for_all_lengths(name):
    region = getattr(elementwise, name).__wrapped__  # torch's operations, without the loops
    torch._dynamo.reset()
    compiled = torch.compile(region, dynamic=True)
    for count in (100, 137, 33):
        x, y, grad, weight, inverse = draw(count, 64), draw(count, 64), draw(count, 64), draw(64), draw(count, 1).abs()
        arguments = {
            "rms_norm": (x, weight, EPS),
            "rms_norm_backward": (grad, x, weight, inverse.float()),
            "swiglu": (x, y),
            "swiglu_backward": (x, y, grad),
        }[name]
        results = []
        for function in (compiled, region):
            copies = [each.clone() if isinstance(each, torch.Tensor) else each for each in arguments]
            found = function(*copies)
            results.append(found if isinstance(found, tuple) else (found,))
        for one, other in zip(*results, strict=True):
            assert one.dtype == other.dtype
            assert (one - other).float().norm() <= 4e-3 * other.float().norm()  # a rounding of bfloat16
        if count == 137:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


# ---- compiled once --------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache that holds nothing yet, and a process that has not looked for the loops."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_the_loops_are_compiled_once_for_a_cpu_and_kept(monkeypatch, tmp_path):
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }')  # the whole of them takes some seconds
    monkeypatch.setattr(library, "_SOURCES", (tmp_path / "one.cpp",))
    assert load_library().one() == 1
    library.load_library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)
    assert load_library().one() == 1
    assert [entry.label for entry in list_entries("kernels")] == ["C++ loops for this CPU"]


@pytest.mark.usefixtures("fresh")
def test_if_they_cannot_be_compiled_it_is_reported_once_and_torch_computes(monkeypatch, tmp_path, caplog):
    (tmp_path / "g++").write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    x = torch.randn(2, 8)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(rms_norm(x, torch.ones(8), EPS)[0], F.rms_norm(x, (8,), eps=EPS))
    (record,) = caplog.records
    assert "takes the slower way, without the C++ loops: no such option" in record.getMessage()
