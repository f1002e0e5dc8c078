"""The C++ for a CPU computes what torch does in float64, rounded once, whatever the number of threads."""

import logging
import subprocess

import pytest
import torch
import torch.nn.functional as F

from qlora_lightning.base.cache import list_entries
from qlora_lightning.model.cpu import library, loops
from qlora_lightning.model.cpu.library import load_library
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


# ---- compiled once --------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache that holds nothing yet, and a process that has not looked for the loops."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
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
