import math

import pytest
import torch

from qlora_lightning.model.kernels import thin
from qlora_lightning.model.kernels.library import is_there
from qlora_lightning.model.kernels.thin import can_narrow, narrow, narrow_and_partner, partner
from qlora_lightning.model.layers.lora import Frozen, gradients_of_b

pytestmark = pytest.mark.skipif(not is_there("thin", torch.bfloat16), reason="takes g++ and AVX512-BF16")

SHAPES = [(1, 32, 1), (2, 64, 8), (37, 96, 3), (300, 576, 24), (2500, 64, 16)]  # rows, width, rank


def draw(rows, width, rank):
    generator = torch.Generator().manual_seed(0)
    wide, matrix, low = (
        torch.randn(*shape, generator=generator) for shape in ((rows, width), (rank, width), (rows, 40))
    )
    low = low.to(torch.bfloat16)[:, 8 : 8 + rank]  # of several linears the products with A lie beside each other
    return wide.to(torch.bfloat16), matrix, low


def assert_near(ours, exact, error):
    assert (ours.double() - exact).norm() <= error * exact.norm()


@pytest.mark.parametrize(("rows", "width", "rank"), SHAPES)
def test_both_products_are_those_of_float64(rows, width, rank):
    wide, matrix, low = draw(rows, width, rank)
    narrowed = wide.double() @ matrix.to(torch.bfloat16).double().t()
    partnered = low.double().t() @ wide.double()
    assert_near(narrow(wide, matrix), narrowed, 2**-8)
    assert_near(partner(wide, low), partnered, 1e-6)
    one, other = narrow_and_partner(wide, matrix, low, 0.7)
    assert_near(one, 0.7 * narrowed, 2**-8)
    assert_near(other, 0.7 * partnered, 1e-6)
    assert (narrow(wide, matrix).dtype, other.dtype) == (torch.bfloat16, torch.float32)


def test_a_matrix_may_lie_turned_and_so_does_its_gradient():
    wide, matrix, low = draw(37, 96, 3)
    turned = matrix.t().contiguous().t()
    for one, other in zip(
        narrow_and_partner(wide, matrix, low, 2.0), narrow_and_partner(wide, turned, low, 2.0), strict=True
    ):
        assert torch.equal(one, other)
    assert narrow_and_partner(wide, turned, low, 2.0)[1].stride() == turned.stride()


def test_results_are_the_same_whatever_the_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(narrow_and_partner(*draw(300, 576, 24), 1.0))
    finally:
        torch.set_num_threads(before)
    for found in zip(*results, strict=True):
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_row_that_is_not_a_number_spoils_what_it_is_part_of():
    wide, matrix, low = draw(37, 96, 3)
    wide[36, 5] = math.nan
    one, other = narrow_and_partner(wide, matrix, low, 1.0)
    assert one.isnan().all(1).nonzero().tolist() == [[36]]
    assert one.isnan().sum() == 3
    assert other.isnan().all(0).nonzero().tolist() == [[5]]
    assert other.isnan().sum() == 3


def test_no_rows_are_no_gradient():
    wide, matrix, low = (each[:0] if each.shape[0] == 2 else each for each in draw(2, 64, 8))
    assert narrow(wide, matrix).shape == (0, 8)
    assert torch.equal(partner(wide, low), torch.zeros(8, 64))


def test_an_adapter_takes_them_where_it_can(monkeypatch):
    wide, matrix, low = draw(37, 96, 3)
    frozen, b = Frozen(None, None, 0.5), torch.nn.Parameter(matrix.t().contiguous())
    ours = gradients_of_b(wide, low, b, frozen, (True, True))
    monkeypatch.setattr(thin, "can_narrow", lambda *args: False)
    for one, other in zip(ours, gradients_of_b(wide, low, b, frozen, (True, True)), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert_near(one, other.double(), 0.01)


def test_what_they_do_not_know_goes_torchs_way():
    wide = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert can_narrow(wide)
    assert not can_narrow(wide.float())
    assert not can_narrow(wide[:, :48])
    assert not can_narrow(torch.zeros(64, 32, dtype=torch.bfloat16).t())
    assert not can_narrow(wide.to("meta"))
