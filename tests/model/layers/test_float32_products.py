import threading

import pytest
import torch

from qlora_lightning.model.layers.float32_products import multiply_to_float32


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


def test_a_product_of_bfloat16_is_rounded_to_float32_alone():
    left, right = draw(3, 70, 64), draw(1, 3, 64, 90)[0]
    product = multiply_to_float32(left, right, 0.3)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product.double(), 0.3 * left.double() @ right.double(), rtol=1e-5, atol=1e-5)


def test_operands_may_lie_transposed():
    left, right = draw(3, 70, 64), draw(1, 3, 90, 64)[0]
    assert torch.equal(
        multiply_to_float32(left, right.transpose(1, 2)),
        multiply_to_float32(left, right.transpose(1, 2).contiguous()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_numbers_are_not_rounded_to_bfloat16(dtype):
    left, right = draw(3, 7, 64, dtype=dtype), draw(1, 3, 64, 9, dtype=dtype)[0]
    expected = left.double() @ right.double()
    torch.testing.assert_close(multiply_to_float32(left, right).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def matmul():
    """The setting that a product changes for as long as it lasts, and those that it may come from."""
    backends = (torch.backends, torch.backends.mkldnn, torch.backends.mkldnn.matmul)
    before = [each.fp32_precision for each in backends]
    yield torch.backends.mkldnn.matmul
    for each, precision in zip(backends, before, strict=True):
        each.fp32_precision = precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_products_of_others_stay_as_precise_as_before(dtype, matmul, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "baddbmm", lambda *_, **__: seen.append(matmul.fp32_precision))
    before = matmul.fp32_precision
    multiply_to_float32(draw(3, 7, 64, dtype=dtype), draw(1, 3, 64, 9, dtype=dtype)[0])
    assert seen == ["bf16" if dtype == torch.bfloat16 else before]
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("chosen", ["bf16", "ieee"])
def test_a_precision_that_is_set_for_all_of_the_backend_still_comes_from_there(chosen, matmul):
    torch.backends.mkldnn.fp32_precision = chosen
    multiply_to_float32(draw(3, 7, 64), draw(1, 3, 64, 9)[0])
    assert matmul.fp32_precision == chosen
    torch.backends.mkldnn.fp32_precision = "tf32"
    assert matmul.fp32_precision == "tf32"


def test_threads_leave_the_precision_as_it_was(matmul):
    left, right, before = draw(3, 64, 64), draw(1, 3, 64, 64)[0], matmul.fp32_precision

    def multiply():
        for _ in range(300):
            multiply_to_float32(left, right)

    threads = [threading.Thread(target=multiply) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert matmul.fp32_precision == before
