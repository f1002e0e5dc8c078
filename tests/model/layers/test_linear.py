import pickle

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

from qlora_lightning.model.layers.fusing import choose_layers, fuse_layers, is_plain
from qlora_lightning.model.layers.lora import FusedLinear, FusedLinear4bit

IN, OUT, RANK = 64, 48, 4
STORAGES = ["none", "nf4", "fp4"]


class OneLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.proj = linear
        self.is_loaded_in_4bit = isinstance(linear, bnb.nn.Linear4bit)
        self.is_loaded_in_8bit = isinstance(linear, bnb.nn.Linear8bitLt)

    def forward(self, x):
        return self.proj(x)


def make_linear(storage, dtype, bias):
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, bias=bias)
    if storage == "none":
        return plain.to(dtype)
    if storage == "int8":
        linear = bnb.nn.Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False)
    else:
        linear = bnb.nn.Linear4bit(IN, OUT, bias=bias, quant_type=storage, compute_dtype=dtype)
        linear.support_avx512bf16_for_cpu = False
    linear.load_state_dict(plain.state_dict())
    return linear.to("cpu")  # quantizes


def make_lora(storage="none", dtype=torch.float32, bias=False, **options):
    base = OneLinear(make_linear(storage, dtype, bias)).requires_grad_(False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=12, target_modules=["proj"], **options))
    layer = model.base_model.model.proj
    with torch.no_grad():
        layer.lora_A["default"].weight.normal_(std=0.3)  # under the seed of make_linear: the same in every model
        layer.lora_B["default"].weight.normal_(std=0.3)
    return model, layer


def outputs_and_gradients(model, layer, dtype=torch.float32, autocast=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, IN, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(2, 7, OUT, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
    (output.float() * weights).sum().backward()
    result = [output.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    return [tensor.float() for tensor in result]


def relative_errors(results, references):
    return [float((a - b).norm() / b.norm()) for a, b in zip(results, references, strict=True)]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_equal_those_of_pefts_own_layer(storage, bias):
    expected = outputs_and_gradients(*make_lora(storage, bias=bias))
    model, layer = make_lora(storage, bias=bias)
    assert fuse_layers(model) == []
    assert type(layer) is (FusedLinear if storage == "none" else FusedLinear4bit)
    assert max(relative_errors(outputs_and_gradients(model, layer), expected)) <= 1e-5


@pytest.mark.parametrize("storage", STORAGES)
def test_gradients_equal_finite_differences(storage):
    model, layer = make_lora(storage)
    fuse_layers(model)
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(2))
    weight = layer.lora_A["default"].weight
    model(x).sum().backward()
    direction = torch.randn(RANK, IN, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():  # linear in A: a whole step is exact
        before = model(x).double().sum()
        weight += direction
        change = model(x).double().sum() - before
    torch.testing.assert_close((weight.grad.double() * direction).sum(), change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", STORAGES)
def test_in_bfloat16_it_errs_no_more_than_the_plain_path(storage):
    model, layer = make_lora(storage)
    if storage == "none":
        layer.base_layer.weight.data = layer.base_layer.weight.data.bfloat16().float()  # the base that bfloat16 has
    exact = outputs_and_gradients(model, layer)
    low = torch.bfloat16
    plain = outputs_and_gradients(*make_lora(storage, low), low, autocast=True)
    model, layer = make_lora(storage, low)
    fuse_layers(model)
    fused = outputs_and_gradients(model, layer, low)
    for ours, theirs in zip(relative_errors(fused, exact), relative_errors(plain, exact), strict=True):
        assert 0 < ours <= 1.5 * theirs


def test_adapters_stay_float32_masters_with_float32_gradients():
    model, layer = make_lora("nf4", torch.bfloat16)
    fuse_layers(model)
    output = model(torch.randn(3, IN).bfloat16())
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        assert weight.dtype == weight.grad.dtype == torch.float32
    assert layer.base_layer.weight.grad is None


def test_an_input_without_gradient_gets_none():
    model, layer = make_lora()
    fuse_layers(model)
    model(torch.randn(3, IN)).sum().backward()
    assert layer.lora_B["default"].weight.grad.any()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_disabled_adapter_leaves_the_base_alone(storage):
    model, layer = make_lora(storage)
    fuse_layers(model)
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(2))
    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))
    assert not torch.equal(model(x), layer.base_layer(x))


def test_a_merged_adapter_is_not_added_twice():
    model, layer = make_lora()
    fuse_layers(model)
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(2))
    expected = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), layer.base_layer(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_two_active_adapters_are_both_added():
    model, layer = make_lora()
    fuse_layers(model)
    model.add_adapter("second", peft.LoraConfig(r=RANK, target_modules=["proj"], init_lora_weights=False))
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(2))

    def answer(adapters):
        model.base_model.set_adapter(adapters)
        return model(x) - layer.base_layer(x)

    both = answer(["default", "second"])
    torch.testing.assert_close(both, answer("default") + answer("second"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("storage", "options"),
    [
        ("none", {"lora_dropout": 0.5}),
        ("nf4", {"lora_dropout": 0.5}),
        ("nf4", {"use_dora": True}),
        ("none", {"lora_bias": True}),
        ("int8", {}),
    ],
)
def test_what_cannot_be_fused_is_named_and_keeps_pefts_forward(storage, options):
    model, layer = make_lora(storage, bias="lora_bias" in options, **options)
    own = type(layer)
    assert fuse_layers(model) == ["base_model.model.proj"]
    assert type(layer) is own
    assert own.__module__.startswith("peft.")


def test_what_is_fused_already_is_not_named_once_an_adapter_is_added():
    model, layer = make_lora("nf4")
    assert fuse_layers(model) == []
    model.add_adapter("second", peft.LoraConfig(r=RANK, target_modules=["proj"]))
    assert fuse_layers(model) == []
    model.add_adapter("third", peft.LoraConfig(r=RANK, target_modules=["proj"], lora_dropout=0.5))
    assert fuse_layers(model) == ["base_model.model.proj"]
    assert type(layer) is FusedLinear4bit


def test_a_part_that_is_not_as_peft_makes_it_is_heard():
    x = torch.randn(3, IN)
    model, layer = make_lora()
    fuse_layers(model)
    before = model(x)
    with_bias = nn.Linear(RANK, OUT)
    with_bias.weight.data = layer.lora_B["default"].weight.data
    layer.lora_B["default"] = with_bias
    choose_layers(model)
    torch.testing.assert_close(model(x), before + 3 * with_bias.bias)  # alpha / rank
    layer.__class__ = type("Own", (type(layer),), {"forward": lambda self, x: 2 * x})
    assert not is_plain(layer)


@pytest.mark.parametrize("storage", ["nf4", "fp4"])
def test_a_model_that_was_pickled_computes_the_same(storage):
    """There bitsandbytes' parameters have become plain ones, which its own forward mends."""
    model, _ = make_lora(storage)
    fuse_layers(model)
    x = torch.randn(3, IN)
    again = pickle.loads(pickle.dumps(model))
    choose_layers(again)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


def test_dropout_drops_in_training():
    model, _ = make_lora(lora_dropout=0.5)
    fuse_layers(model)
    x = torch.randn(3, IN)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_without_rows_the_output_has_none():
    model, _ = make_lora()
    fuse_layers(model)
    assert model(torch.randn(2, 0, IN)).shape == (2, 0, OUT)


def test_the_adapter_that_is_left_when_ours_is_deleted_is_used():
    model, layer = make_lora()
    fuse_layers(model)
    model.add_adapter("second", peft.LoraConfig(r=RANK, target_modules=["proj"], init_lora_weights=False))
    model.set_adapter("second")
    model.delete_adapter("default")
    x = torch.randn(3, IN)
    assert not torch.equal(model(x), layer.base_layer(x))


def test_a_second_derivative_is_refused():
    model, layer = make_lora()
    fuse_layers(model)
    x = torch.randn(3, IN, requires_grad=True)
    (first,) = torch.autograd.grad(model(x).square().sum(), layer.lora_A["default"].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
