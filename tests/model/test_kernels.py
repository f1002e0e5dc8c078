"""The C++ for a CPU computes what torch does in float64, rounded once, whatever the number of threads."""

import logging
import math
import subprocess

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from torch import nn

from qlora_lightning.base.cache import list_entries
from qlora_lightning.model.cpu import library, loops, products
from qlora_lightning.model.cpu.library import is_there, load_library
from qlora_lightning.model.cpu.products import can_multiply, multiply
from qlora_lightning.model.layers import elementwise, lora
from qlora_lightning.model.layers.elementwise import Rotary, rms_norm, rms_norm_again, rms_norm_backward, swiglu
from qlora_lightning.model.layers.lora import FrozenLinear, project

pytestmark = pytest.mark.skipif(load_library() is None, reason="takes Linux and g++")
has_products = pytest.mark.skipif(not is_there("multiply", torch.bfloat16), reason="takes AVX512-BF16")

ERRORS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # relative to the largest number
EPS = 1e-5


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    draw.generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(products, "_has_amx", lambda: False)


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=draw.generator).to(dtype)


def assert_near(ours, exact, dtype):
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().max() <= ERRORS[dtype] * exact.abs().max()


def assert_same_on_any_threads(compute):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    for found in zip(*results, strict=True):
        assert all(torch.equal(found[0], other) for other in found[1:])


# ---- row by row -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 5), (5, 7), (200, 576)])
def test_a_norm_and_its_gradient(rows, width, dtype):
    x, weight, grad = (draw(*shape, dtype=dtype) for shape in ((rows, width), (width,), (rows, width)))
    assert loops.can_run(x, weight)
    exact_x = x.double().requires_grad_()
    exact = F.rms_norm(exact_x, (width,), weight.double(), EPS)
    normed, inverse = rms_norm(x, weight, EPS)
    assert torch.equal(rms_norm_again(x, weight, inverse), normed)
    (exact_grad,) = torch.autograd.grad((exact * grad.double()).sum(), exact_x)
    if rows:
        assert_near(normed, exact.detach(), dtype)
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
    turned, again = Rotary.apply(states, states, cos, sin)
    assert torch.equal(turned, again)
    (ours,) = torch.autograd.grad((turned, again), states, (grad, torch.zeros_like(grad)))
    assert turned.stride() == ours.stride() == states.stride()
    exact_states = states.detach().double().requires_grad_()
    swapped = torch.cat([-exact_states[..., 4:], exact_states[..., :4]], -1)
    exact = exact_states * cos.double() + swapped * sin.double()
    assert_near(turned.detach(), exact.detach(), dtype)
    assert_near(ours, torch.autograd.grad(exact, exact_states, grad.double())[0], dtype)


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even():
    numbers = torch.arange(0x3F80, 0x3FC0, dtype=torch.int16).view(torch.bfloat16)
    angles = numbers[:, None].expand(64, 2).contiguous()
    for factor in torch.tensor([1.0, 1.5, 1.25, 1.125]).to(torch.bfloat16):
        states = factor.expand(64, 1, 2).contiguous()
        turned = loops.rotate(states, angles, torch.zeros_like(angles), backward=False)
        assert torch.equal(turned[:, 0, 0], numbers * factor)


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
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds: the vocabulary has 3 tokens"):
            loops.cross_entropy(logits, torch.tensor([0, 0, bad]), True)


def test_one_number_that_is_none_spoils_its_row_alone(dtype):
    x, weight = draw(3, 40, dtype=dtype), torch.ones(40, dtype=dtype)
    x[1, 5] = math.nan
    normed, inverse = rms_norm(x, weight, EPS)
    grad = loops.rms_norm_backward(torch.ones_like(x), x, weight, inverse)
    nll, _ = loops.cross_entropy(x, torch.tensor([0, 1, 2]), True)
    for found in (normed.isnan().all(-1), grad.isnan().all(-1), nll.isnan(), x.isnan().all(-1)):
        assert found.tolist() == [False, True, False]


def test_loops_are_the_same_on_any_threads(dtype):
    x, weight = draw(50, 576, dtype=dtype), draw(576, dtype=dtype)

    def compute():
        normed, inverse = rms_norm(x, weight, EPS)
        of_x = rms_norm_backward(x.clone(), x, weight, inverse)
        return normed, inverse, of_x, swiglu(x, normed), *loops.cross_entropy(x.clone(), torch.arange(50), True)

    assert_same_on_any_threads(compute)


# ---- products with frozen weights -----------------------------------------------------------------------------------

OUT, IN = 160, 192  # five and six panels of 32 columns
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), None]


def draw_weight(kind, shape=(OUT, IN), dtype=torch.bfloat16):
    """Draw a weight in 4 bits, by its type and whether it is quantized doubly, or a dense one."""
    if kind is None:
        return draw(*shape)
    linear = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=kind[0], compress_statistics=kind[1])
    linear.weight.data = draw(*shape).to(dtype)
    return linear.to("cpu").weight


def dense(weight):
    if not isinstance(weight, bnb.nn.Params4bit):
        return weight.double()
    return dequantize_4bit(weight.data, weight.quant_state).to(torch.bfloat16).double()


def assert_rounded_once(ours, exact):
    """Half a step of bfloat16, and what sums in float32 err."""
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()


@has_products
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_a_weight_is_made_dense_bit_for_bit_as_bitsandbytes_does(kind, dtype):
    weight = draw_weight(kind, dtype=dtype)
    rows, columns = (torch.eye(width, dtype=torch.bfloat16) for width in (IN, OUT))
    assert torch.equal(multiply([rows], [weight], False).t().double(), dense(weight))
    assert torch.equal(multiply([columns], [weight], True).double(), dense(weight))


@has_products
@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        *((rows, (OUT, IN)) for rows in (1, 8, 21)),
        *((9, shape) for shape in ((64, 8192), (4096, 64), (1568, 1600))),  # deep: summed up in several sweeps
    ],
)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=str)
def test_all_that_a_result_is_the_sum_of_is_rounded_once(rows, shape, kind):
    weight, x, bias, residual = draw_weight(kind, shape), draw(rows, shape[1]), draw(shape[0]), draw(rows, shape[0])
    # of several linears the products with A are beside each other
    xa, a, b = draw(rows, 12)[:, 6:], draw(6, shape[1]), draw(shape[0], 6)
    exact = x.double() @ dense(weight).t()
    assert_rounded_once(multiply([x], [weight], False), exact)
    exact += 0.7 * xa.double() @ b.double().t() + bias.double() + residual.double()
    assert_rounded_once(multiply([x], [weight], False, xa, b, 0.7, bias, residual), exact)
    # the gradients of linears that share their input
    weights, grads = [weight, draw_weight(("fp4", False), (64, shape[1]))], [draw(rows, shape[0]), draw(rows, 64)]
    exact = sum(grad.double() @ dense(weight) for grad, weight in zip(grads, weights, strict=True))
    assert_rounded_once(multiply(grads, weights, True, xa, a), exact + xa.double() @ a.double())


@has_products
def test_products_are_the_same_on_any_threads_and_a_row_that_is_no_number_spoils_itself_alone():
    weight, x, xa, b = draw_weight(KINDS[0], (512, 64)), draw(100, 64), draw(100, 2), draw(512, 2)
    assert_same_on_any_threads(lambda: [multiply([x], [weight], False, xa, b)])
    x[3, 5] = math.nan
    spoilt = multiply([x], [weight], False).isnan()
    assert spoilt[3].all()
    assert spoilt.sum() == 512


@pytest.mark.parametrize(("kind", "width"), [*((kind, 384) for kind in KINDS[:3]), (KINDS[0], 96)], ids=str)
def test_tiles_of_a_weight_give_the_products_of_the_whole_to_the_last_bit(monkeypatch, kind, width, dtype):
    """Rows of 96 hold no whole blocks."""
    weight = draw_weight(kind, (640, width), dtype)
    x, grad = draw(7, width, dtype=dtype), draw(7, 640, dtype=dtype)

    def compute():
        return [
            lora.multiply_by_weight(weight, x),
            lora.multiply_by_weight(weight, x, onto=grad.clone()),
            lora.multiply_by_weight(weight, grad, backward=True),
            lora.multiply_by_weight(weight, grad, backward=True, onto=x.clone()),
        ]

    whole = compute()
    monkeypatch.setattr(lora, "TILE_BYTES", 100_000)  # 64 to 128 rows or columns, the last tile narrower
    assert all(map(torch.equal, compute(), whole))


# ---- what they do not know goes torch's way -------------------------------------------------------------------------


def test_loops_and_products_do_not_run(monkeypatch):
    x, ones = torch.randn(4, 8), torch.ones(8)
    assert loops.can_run(x, nn.Parameter(ones))
    for others in ([x.double()], [x.half()], [x, ones.bfloat16()], [x.t()], [x.to("meta")]):
        assert not loops.can_run(*others)
    weight, x, plain = draw_weight(KINDS[0]), draw(16, IN), draw(OUT, IN)
    for other_weight, other in [
        *((weight, each) for each in (x.float(), x.t()[:16], x.to("meta"), draw(3, IN // 2))),
        (draw_weight(KINDS[0], (OUT, 96)), draw(16, 96)),  # a block of 64 continues in the next row
        (draw_weight(KINDS[0], (48, IN)), x),  # a panel and a half
        *((each, x) for each in (plain.float(), draw(IN, OUT).t())),
        (draw(OUT, 80), draw(16, 80)),
    ]:
        assert not can_multiply(other_weight, other, backward=False)
    assert project(x, draw(16, 3), draw(OUT, 3), FrozenLinear(weight, None, 0.5)).shape == (16, OUT)  # no pairs
    assert can_multiply(weight, x, backward=False) == is_there("multiply", torch.bfloat16)
    monkeypatch.setattr(products, "_has_amx", lambda: True)
    assert not can_multiply(weight, x, backward=False)


# ---- the same regions as a GPU runs them, here compiled by inductor for a CPU ---------------------------------------


def calls_of_norm(count):
    x, weight, grad = draw(count, 64), draw(64), draw(count, 64)
    inverse = elementwise.rms_norm.__wrapped__(x, weight, EPS)[1]
    yield elementwise.rms_norm.__wrapped__, (x, weight, EPS)
    yield elementwise.rms_norm_again.__wrapped__, (x, weight, inverse)
    yield elementwise.rms_norm_backward.__wrapped__, (grad, x, weight, inverse)


def calls_of_rotary(count):
    query, key = (draw(1, count, 4, 16).transpose(1, 2) for _ in range(2))
    angles = draw(1, count, 8, dtype=torch.float32).repeat(1, 1, 2)
    for backward in (False, True):
        yield elementwise._rotate, (query, key[:, :2], angles.cos().bfloat16(), angles.sin().bfloat16(), backward)


def calls_of_swiglu(count):
    gate, up, grad = (draw(count, 96) for _ in range(3))
    yield elementwise.swiglu.__wrapped__, (gate, up)
    for needed in ((True, True, True), (False, True, False)):
        yield elementwise.swiglu_backward.__wrapped__, (gate, up, grad, *needed)


def run(function, arguments):
    copies = [each.clone() if isinstance(each, torch.Tensor) else each for each in arguments]
    found = function(*copies)
    return [each for each in (found if isinstance(found, tuple) else (found,)) if each is not None]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of what its own compiler does
@pytest.mark.parametrize("calls", [calls_of_norm, calls_of_rotary, calls_of_swiglu])
def test_compiled_they_give_the_same_numbers_and_are_compiled_once_for_all_lengths(calls):
    torch._dynamo.reset()
    for count in (100, 137, 33):
        if count == 33:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for function, arguments in calls(count):
            compiled = run(elementwise._compile(function), arguments)
            for one, other in zip(compiled, run(function, arguments), strict=True):
                assert one.dtype == other.dtype
                assert (one - other).float().norm() <= 4e-3 * other.float().norm()  # a rounding of bfloat16
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
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda patch, _: patch.setattr(library, "_OPTIONS", ("--no-such-option",)), "--no-such-option"),
        (lambda patch, _: patch.setattr(library, "_has_gnu_threads", lambda: False), "this torch has no GNU threads"),
        (lambda _, folder: (folder / "cache").write_text("a file"), "The cache cannot keep"),
    ],
)
def test_if_they_cannot_be_compiled_it_is_reported_once_and_torch_computes(
    change, reason, monkeypatch, tmp_path, caplog
):
    change(monkeypatch, tmp_path)
    x = torch.randn(2, 8)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(rms_norm(x, torch.ones(8), EPS)[0], F.rms_norm(x, (8,), eps=EPS))
        rms_norm(x, torch.ones(8), EPS)
    (record,) = caplog.records
    assert "takes the slower way" in record.getMessage()
    assert reason in record.getMessage()
