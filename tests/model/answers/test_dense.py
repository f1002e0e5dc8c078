import types

import bitsandbytes as bnb
import pytest
import torch

from qlora_lightning.model import generate
from qlora_lightning.model.adapters.lora import add_adapters
from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.generate import dense_weights
from qlora_lightning.model.layers.fusing import fuse_layers

IDS = torch.tensor([[11, 12, 13]])


@pytest.fixture(params=["fp32", "bf16"])
def model(request, tiny_base):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[request.param]
    made = add_adapters(load_base(str(tiny_base), compute_dtype=dtype).model).eval()
    fuse_layers(made)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return made


def quantized(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, bnb.nn.Linear4bit)}


@torch.no_grad()
def test_every_product_is_what_it_was_with_and_without_the_adapter(model):
    """In float32 to the last bit; in bfloat16 products with weights in 4 bits may go by the C++ loops."""
    error = 0.0 if next(iter(quantized(model).values())).compute_dtype is torch.float32 else 2**-6
    before = quantized(model)
    assert len(before) == 14
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
    adapted = model(input_ids=IDS).logits
    with dense_weights(model) as is_dense:
        assert is_dense
        assert quantized(model) == {}
        torch.testing.assert_close(model(input_ids=IDS).logits, adapted, rtol=error, atol=error)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=IDS).logits, base, rtol=error, atol=error)
        with dense_weights(model):  # inside one another
            pass
        assert quantized(model) == {}
    assert quantized(model) == before
    assert not torch.equal(base, adapted)


def test_the_4_bit_linears_come_back_after_an_error(model):
    before = quantized(model)
    with pytest.raises(ZeroDivisionError), dense_weights(model):
        raise ZeroDivisionError
    assert quantized(model) == before


def test_without_memory_for_it_nothing_is_made_dense(model, monkeypatch):
    needed = sum(
        part.in_features * part.out_features * part.compute_dtype.itemsize for part in quantized(model).values()
    )
    for available, expected in ((2 * needed - 2, False), (2 * needed, True)):
        free = types.SimpleNamespace(available=available)
        monkeypatch.setattr(generate.psutil, "virtual_memory", lambda free=free: free)
        with dense_weights(model) as is_dense:
            assert is_dense == expected
            assert len(quantized(model)) == (0 if expected else 14)
