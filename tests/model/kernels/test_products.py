import math

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from qlora_lightning.model.kernels import products
from qlora_lightning.model.kernels.library import is_there
from qlora_lightning.model.kernels.products import can_multiply, multiply
from qlora_lightning.model.layers.lora import Frozen, narrow, project, project_back

pytestmark = pytest.mark.skipif(not is_there("multiply", torch.bfloat16), reason="takes g++ and AVX512-BF16")

OUT, IN = 160, 192  # five and six panels of 32 columns


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    draw.generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(products, "_has_amx", lambda: False)


def draw(*shape):
    return torch.randn(*shape, generator=draw.generator).to(torch.bfloat16)


def quantized(quant_type="nf4", double_quant=True, shape=(OUT, IN), dtype=torch.bfloat16):
    linear = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=False, quant_type=quant_type, compute_dtype=dtype, compress_statistics=double_quant
    )
    linear.weight.data = draw(*shape).to(dtype)
    return linear.to("cpu").weight


def draw_weight(kind, shape):
    return draw(*shape) if kind is None else quantized(*kind, shape=shape)


def dense(weight):
    if not isinstance(weight, bnb.nn.Params4bit):
        return weight.double()
    return dequantize_4bit(weight.data, weight.quant_state).to(torch.bfloat16).double()


def assert_rounded_once(ours, exact):
    """Half a step of bfloat16, and what sums in float32 err."""
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_a_weight_is_made_dense_bit_for_bit_as_bitsandbytes_does(quant_type, double_quant, dtype):
    weight = quantized(quant_type, double_quant, dtype=dtype)
    rows, columns = (torch.eye(width, dtype=torch.bfloat16) for width in (IN, OUT))
    assert torch.equal(multiply([rows], [weight], False).t().double(), dense(weight))
    assert torch.equal(multiply([columns], [weight], True).double(), dense(weight))


@pytest.mark.parametrize("rows", [1, 7, 8, 21, 128])
@pytest.mark.parametrize("kind", [("nf4", True), ("nf4", False), ("fp4", True), None], ids=str)
def test_all_that_an_output_is_the_sum_of_is_rounded_once(rows, kind):
    weight, x, bias, residual = draw_weight(kind, (OUT, IN)), draw(rows, IN), draw(OUT), draw(rows, OUT)
    lows, b = draw(rows, 12), draw(OUT, 6)
    low = lows[:, 6:]  # of several linears the products with A lie beside each other
    ours = multiply([x], [weight], False, low, b, 0.7, bias, residual)
    thin = low.double() @ b.double().t()
    assert_rounded_once(ours, x.double() @ dense(weight).t() + 0.7 * thin + bias.double() + residual.double())
    assert_rounded_once(multiply([x], [weight], False), x.double() @ dense(weight).t())


@pytest.mark.parametrize("rows", [1, 7, 8, 21, 128])
def test_the_gradients_of_linears_that_share_their_input_are_one_sum(rows):
    weights = [quantized(), quantized("fp4", False, shape=(64, IN)), draw(32, IN)]
    grads = [draw(rows, len(dense(weight))) for weight in weights]
    low, a = draw(rows, 4), draw(4, IN)
    exact = sum(grad.double() @ dense(weight) for grad, weight in zip(grads, weights, strict=True))
    assert_rounded_once(multiply(grads, weights, True, low, a), exact + low.double() @ a.double())
    assert_rounded_once(multiply(grads, weights, True), exact)


@pytest.mark.parametrize("kind", [("nf4", True), None], ids=str)
@pytest.mark.parametrize("shape", [(64, 8192), (4096, 64), (1568, 1600)])
def test_deep_products_are_summed_up_in_several_sweeps(shape, kind):
    weight, x, grad = draw_weight(kind, shape), draw(9, shape[1]), draw(9, shape[0])
    low, a, b, residual = draw(9, 2), draw(2, shape[1]), draw(shape[0], 2), draw(9, shape[0])
    thin = low.double() @ b.double().t()
    exact = x.double() @ dense(weight).t() + 0.3 * thin + residual.double()
    assert_rounded_once(multiply([x], [weight], False, low, b, 0.3, None, residual), exact)
    exact = 2 * grad.double() @ dense(weight) + low.double() @ a.double()
    assert_rounded_once(multiply([grad, grad], [weight, weight], True, low, a), exact)


def test_results_are_the_same_whatever_the_number_of_threads():
    before, results = torch.get_num_threads(), []
    weight, x, low, b = quantized(shape=(512, 64)), draw(100, 64), draw(100, 2), draw(512, 2)
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(multiply([x], [weight], False, low, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_row_that_is_not_a_number_spoils_itself_alone():
    x = draw(20, IN)
    x[3, 5] = math.nan
    spoilt = multiply([x], [quantized()], False).isnan()
    assert spoilt[3].all()
    assert spoilt.sum() == OUT


def frozen(weight):
    return Frozen(weight, None, 0.5)


def test_a_linear_takes_them_where_it_can(monkeypatch):
    ran = []
    monkeypatch.setattr(products, "multiply", lambda *args: ran.append(args) or multiply(*args))
    weight, x, grad = quantized(), draw(16, IN), draw(16, OUT)
    a, b = (torch.nn.Parameter(draw(*shape).float()) for shape in ((4, IN), (OUT, 4)))
    low, residual = x @ a.to(x.dtype).t(), draw(4, 4, OUT)

    def both_ways():
        return project(x, low, b, frozen(weight), residual), project_back([grad], [frozen(weight)], low, [a])

    ours = both_ways()
    assert len(ran) == 2
    monkeypatch.setattr(products, "can_multiply", lambda *args, **kwargs: False)
    theirs = both_ways()
    assert len(ran) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()


def test_what_they_do_not_know_goes_torchs_way(monkeypatch):
    weight, x = quantized(), draw(16, IN)
    assert can_multiply(weight, x, turned=False)
    assert not can_multiply(weight, x.float(), turned=False)
    assert not can_multiply(weight, x.t()[:16], turned=False)
    assert not can_multiply(weight, x.to("meta"), turned=False)
    runs_on = quantized(shape=(OUT, 96))  # a block of 64 into the next row
    assert not can_multiply(runs_on, draw(16, 96), turned=False)
    assert not can_multiply(quantized(shape=(48, IN)), x, turned=False)  # a panel and a half
    plain = torch.nn.Parameter(draw(OUT, IN))
    assert can_multiply(plain, x, turned=False)
    assert not can_multiply(plain.float(), x, turned=False)
    assert not can_multiply(draw(IN, OUT).t(), x, turned=False)
    assert not can_multiply(draw(OUT, 80), draw(16, 80), turned=False)
    odd = project(x, draw(16, 3), draw(OUT, 3), frozen(weight))
    assert odd.shape == (16, OUT)
    monkeypatch.setattr(products, "_has_amx", lambda: True)
    assert not can_multiply(weight, x, turned=False)


def test_shapes_that_do_not_fit_are_told_by_torch():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        project(draw(3, IN // 2), None, None, frozen(quantized()))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        narrow(draw(3, 2 * IN), [torch.randn(4, IN)])
