"""A fused LoRA linear over a frozen weight computes what PEFT's own does, whatever PEFT does with its adapters."""

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

from qlora_lightning.model.layers import lora
from qlora_lightning.model.layers.fusing import fuse_layers
from qlora_lightning.model.layers.lora import FusedLinear, FusedLinear4bit, multiply_by_weight
from tests.steps import randomize

IN, OUT, RANK = 64, 48, 4


class OneLinear(nn.Module):
    def __init__(self, storage, bias):
        super().__init__()
        torch.manual_seed(0)
        plain = nn.Linear(IN, OUT, bias=bias)
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = storage in ("nf4", "fp4"), storage == "int8"
        self.proj = plain
        if storage == "int8":
            self.proj = bnb.nn.Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False)
        elif storage != "none":
            self.proj = bnb.nn.Linear4bit(IN, OUT, bias=bias, quant_type=storage, compute_dtype=torch.float32)
        self.proj.load_state_dict(plain.state_dict())
        self.requires_grad_(False).to("cpu")  # quantizes

    def forward(self, x):
        return self.proj(x)


def make_lora(storage="none", bias=False, **options):
    config = peft.LoraConfig(r=RANK, lora_alpha=12, target_modules=["proj"], **options)
    model = peft.get_peft_model(OneLinear(storage, bias), config)
    return randomize(model, std=0.3), model.base_model.model.proj


def inputs(*shape):
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("storage", ["none", "nf4", "fp4"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_gives_the_outputs_and_gradients_of_pefts_own(storage, bias):
    found = []
    for fast in (False, True):
        model, layer = make_lora(storage, bias)
        assert not fast or fuse_layers(model) == []
        x = inputs(2, 7).requires_grad_()
        output = model(x)
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        found.append([output, *torch.autograd.grad(output.sin().sum(), [x, *weights])])
    assert type(layer) is (FusedLinear if storage == "none" else FusedLinear4bit)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))
    assert model(inputs(2, 0)).shape == (2, 0, OUT)


@pytest.mark.parametrize(
    ("storage", "options"),
    [("nf4", {"lora_dropout": 0.5}), ("nf4", {"use_dora": True}), ("none", {"lora_bias": True}), ("int8", {})],
)
def test_what_cannot_be_fused_is_named_and_keeps_pefts_forward(storage, options):
    model, layer = make_lora(storage, bias="lora_bias" in options, **options)
    assert fuse_layers(model) == ["base_model.model.proj"]
    assert type(layer).__module__.startswith("peft.")


def test_adapters_may_be_merged_added_and_deleted():
    model, layer = make_lora()
    fuse_layers(model)
    x = inputs(3)
    base, first = layer.base_layer(x), model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), first, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), first, rtol=1e-5, atol=1e-5)
    model.add_adapter("second", peft.LoraConfig(r=RANK, target_modules=["proj"], init_lora_weights=False))
    assert fuse_layers(model) == []
    model.base_model.set_adapter("second")
    second = model(x)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(model(x) - base, (first - base) + (second - base), rtol=1e-5, atol=1e-5)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(model(x), second)
    assert not torch.equal(second, base)
    model.add_adapter("third", peft.LoraConfig(r=RANK, target_modules=["proj"], lora_dropout=0.5))
    assert fuse_layers(model) == ["base_model.model.proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("quant_type", "double_quant", "width"),
    [("nf4", True, 384), ("nf4", False, 384), ("fp4", True, 384), ("nf4", True, 96)],  # the last: no whole blocks
)
def test_tiles_of_a_weight_give_the_products_of_the_whole_to_the_last_bit(
    monkeypatch, quant_type, double_quant, width, dtype
):
    generator = torch.Generator().manual_seed(0)
    quantized = bnb.nn.Linear4bit(width, 640, bias=False, quant_type=quant_type, compress_statistics=double_quant)
    quantized.weight.data = torch.randn(640, width, generator=generator).to(dtype)
    weight = quantized.to("cpu").weight
    x, grad = (torch.randn(7, each, generator=generator).to(dtype) for each in (width, 640))

    def products():
        return [
            multiply_by_weight(weight, x),
            multiply_by_weight(weight, x, onto=grad.clone()),
            multiply_by_weight(weight, grad, backward=True),
            multiply_by_weight(weight, grad, backward=True, onto=x.clone()),
        ]

    whole = products()
    monkeypatch.setattr(lora, "TILE_BYTES", 100_000)  # 64 to 128 rows or columns, the last tile narrower
    assert all(map(torch.equal, products(), whole))
