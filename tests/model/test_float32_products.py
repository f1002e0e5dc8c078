import pytest
import torch

from qlora_lightning.model.float32_products import multiply_to_float32


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_products_of_others_stay_as_precise_as_before(dtype, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "baddbmm", lambda *_, **__: seen.append(torch.backends.mkldnn.matmul.fp32_precision))
    before = torch.backends.mkldnn.matmul.fp32_precision
    multiply_to_float32(draw(3, 7, 64, dtype=dtype), draw(1, 3, 64, 9, dtype=dtype)[0])
    assert seen == ["bf16" if dtype == torch.bfloat16 else before]
    assert torch.backends.mkldnn.matmul.fp32_precision == before
