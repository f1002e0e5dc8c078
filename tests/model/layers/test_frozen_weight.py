import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qlora_lightning.model.layers import lora
from qlora_lightning.model.layers.lora import FrozenWeight

OUT, IN, TOKENS = 640, 384, 7
SMALL = 100_000  # bytes: tiles of 64 to 128 rows or columns, the last one narrower


def quantized(quant_type="nf4", double_quant=True, dtype=torch.bfloat16, shape=(OUT, IN)):
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=False, quant_type=quant_type, compute_dtype=dtype, compress_statistics=double_quant
    )
    linear.weight.data = torch.randn(shape, dtype=dtype)
    return linear.to("cpu").weight


def products(stored, dtype):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    outputs, inputs = stored.quant_state.shape
    x, grad = random(TOKENS, inputs), random(TOKENS, outputs)
    weight, onto, onto_back = FrozenWeight(stored), random(TOKENS, outputs), random(TOKENS, inputs)
    return [
        weight.multiply(x),
        weight.multiply(x, onto),
        weight.multiply_back(grad),
        weight.multiply_back(grad, onto_back),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_tiles_give_the_whole_weights_products_to_the_last_bit(monkeypatch, quant_type, double_quant, dtype):
    stored = quantized(quant_type, double_quant, dtype)
    whole = products(stored, dtype)
    monkeypatch.setattr(lora, "TILE_BYTES", SMALL)
    assert FrozenWeight(stored)._has_tiles(dtype)
    for tiled, expected in zip(products(stored, dtype), whole, strict=True):
        assert torch.equal(tiled, expected)


def test_tiles_are_as_small_as_told_and_cover_the_weight(monkeypatch):
    stored = quantized()
    dense = bnb.functional.dequantize_4bit(stored.data, stored.quant_state)
    monkeypatch.setattr(lora, "TILE_BYTES", SMALL)
    for dim in (0, 1):
        tiles = list(FrozenWeight(stored)._tiles(dim, torch.bfloat16))
        assert torch.equal(torch.cat([tile for _, tile in tiles], dim), dense)
        assert len(tiles) > 2
        assert all(torch.equal(dense[rows] if dim == 0 else dense[:, rows], tile) for rows, tile in tiles)
        assert max(tile.nbytes for _, tile in tiles) <= 64 * max(OUT, IN) * 2 + SMALL  # whole blocks of 64


@pytest.mark.parametrize("tile_bytes", [SMALL, 1 << 30])
def test_a_sum_takes_the_place_of_what_it_is_added_onto(monkeypatch, tile_bytes):
    monkeypatch.setattr(lora, "TILE_BYTES", tile_bytes)
    weight = FrozenWeight(quantized())
    by_output, by_input = (torch.ones(TOKENS, width, dtype=torch.bfloat16) for width in (OUT, IN))
    assert weight.multiply(torch.ones_like(by_input), by_output) is by_output
    assert weight.multiply_back(torch.ones(TOKENS, OUT, dtype=torch.bfloat16), by_input) is by_input


def test_a_weight_whose_rows_are_no_whole_blocks_is_made_dense_as_a_whole(monkeypatch):
    stored = quantized(shape=(OUT, 96))  # a block of 64 runs on into the next row
    whole = products(stored, torch.bfloat16)
    monkeypatch.setattr(lora, "TILE_BYTES", 1000)
    assert not FrozenWeight(stored)._has_tiles(torch.bfloat16)
    for now, before in zip(products(stored, torch.bfloat16), whole, strict=True):
        assert torch.equal(now, before)


def test_a_plain_weight_is_used_as_it_is():
    weight = nn.Parameter(torch.arange(6.0).view(2, 3), requires_grad=False)
    x = torch.tensor([[1.0, 0.0, 2.0]])
    assert FrozenWeight(weight).multiply(x).tolist() == [[4.0, 13.0]]  # 0 + 2·2 and 3 + 2·5
    assert FrozenWeight(weight).multiply_back(torch.tensor([[1.0, 2.0]])).tolist() == [[6.0, 9.0, 12.0]]
