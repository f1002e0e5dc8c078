import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qlora_lightning.model.optimizer import build_optimizer
from qlora_lightning.support.errors import UserError


def make_groups(**own):
    torch.manual_seed(0)
    return [{"params": [nn.Parameter(torch.randn(64, 80))], **own}]  # bitsandbytes keeps states below 4096 in 32 bits


def build(choice=None, groups=None, learning_rate=0.1, weight_decay=0.0, fused=True):
    return build_optimizer(groups or make_groups(), choice, learning_rate, weight_decay, fused)


def step(optimizer):
    (parameter,) = optimizer.param_groups[0]["params"]
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return parameter.detach() - before


@pytest.mark.parametrize("fused", [True, False])
def test_the_default_is_torchs_adamw_fused_where_allowed(fused):
    optimizer = build(weight_decay=0.25, fused=fused)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["fused"]) == (0.1, 0.25, fused)


def test_a_groups_own_learning_rate_stays():
    groups = make_groups(lr=0.5) + make_groups()
    assert [group["lr"] for group in build(groups=groups).param_groups] == [0.5, 0.1]


@pytest.mark.parametrize("choice", ["torch.optim.SGD", {"class_path": "torch.optim.SGD"}])
def test_a_class_path_is_built_with_the_learning_rate(choice):
    optimizer = build(choice)
    assert type(optimizer) is torch.optim.SGD
    torch.testing.assert_close(step(optimizer), torch.full((64, 80), -0.1))  # lr × gradient


def test_init_args_are_handed_on():
    optimizer = build({"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.5}}, weight_decay=0.25)
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.25)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_bitsandbytes_8_bit_optimizers_step_on_a_cpu(name):
    optimizer = build(f"bitsandbytes.optim.{name}")
    assert type(optimizer) is getattr(bnb.optim, name)
    torch.testing.assert_close(step(optimizer), torch.full((64, 80), -0.1), rtol=1e-2, atol=1e-3)  # Adam: lr × sign
    (state,) = optimizer.state.values()
    assert state["state1"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("choice", "weight_decay", "sentence"),
    [
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}, 0.0, "sets lr.*set model.learning_rate"),
        ({"class_path": "torch.optim.SGD", "init_args": {"weight_decay": 1.0}}, 0.0, "set model.weight_decay"),
        ({"class_path": "torch.optim.SGD", "init_args": {"momentun": 0.9}}, 0.0, "does not take.*momentun"),
        ({"class_path": "torch.optim.SGD", "init_args": {"momentum": -1.0}}, 0.0, "Invalid momentum"),
        ({"class_path": "torch.optim.SGD", "lr": 1.0}, 0.0, "expected a class_path"),
        ({"init_args": {}}, 0.0, "expected a class_path"),
        ("torch.optim.AdamX", 0.0, "'torch.optim.AdamX' cannot be imported"),
        ("no_such_package.Adam", 0.0, "cannot be imported"),
        ("AdamW", 0.0, "cannot be imported"),
        ("torch.nn.Linear", 0.0, "is not a torch optimizer class"),
        ("torch.optim.LBFGS", 0.5, "weight_decay is 0.5, but torch.optim.LBFGS has none"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(choice, weight_decay, sentence):
    with pytest.raises(UserError, match=sentence):
        build(choice, weight_decay=weight_decay)
