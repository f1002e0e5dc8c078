"""The optimizer, LoRA+, the schedule, and windows whose gradients are sums divided once."""

import math

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from qlora_lightning import LossSums, QLoRAModule
from qlora_lightning.model.step.optimizer import build_optimizer, build_schedule, count_optimizer_steps
from qlora_lightning.model.step.window import Window
from qlora_lightning.support.errors import UserError
from tests.steps import make_module


def build(choice=None, learning_rate=0.1, weight_decay=0.0, fused=True, **own):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 80))
    return build_optimizer([{"params": [weight], **own}], choice, learning_rate, weight_decay, fused)


SGD = {"class_path": "torch.optim.SGD"}


@pytest.mark.parametrize(
    ("arguments", "cls", "group"),
    [
        ({"weight_decay": 0.25}, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.25, "fused": True}),
        ({"fused": False, "lr": 0.5}, torch.optim.AdamW, {"lr": 0.5, "fused": False}),  # a group's own rate
        ({"choice": {**SGD, "init_args": {"momentum": 0.5}}}, torch.optim.SGD, {"momentum": 0.5}),
    ],
)
def test_the_optimizer_is_built_as_chosen(arguments, cls, group):
    optimizer = build(**arguments)
    assert type(optimizer) is cls
    assert {name: optimizer.param_groups[0][name] for name in group} == group


@pytest.mark.parametrize(
    ("choice", "weight_decay", "sentence"),
    [
        ({**SGD, "init_args": {"lr": 1.0}}, 0.0, "sets lr.*set model.learning_rate"),
        ({**SGD, "init_args": {"momentun": 0.9}}, 0.0, "does not take.*momentun"),
        ({**SGD, "lr": 1.0}, 0.0, "expected a class_path"),
        ("torch.optim.LBFGS", 0.5, "weight_decay is 0.5, but torch.optim.LBFGS has none"),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_refused(choice, weight_decay, sentence):
    with pytest.raises(UserError, match=sentence):
        build(choice, weight_decay=weight_decay)


@pytest.mark.parametrize("lora_options", [{}, {"use_dora": True}, {"trainable_token_indices": [3]}], ids=str)
def test_lora_plus_gives_each_tensor_the_rate_that_peft_gives_it(tiny_base, lora_options):
    options = {"loraplus_ratio": 16.0, "learning_rate": 1e-4, "weight_decay": 0.1, "quantization": "none"}
    module = make_module(tiny_base, lora_options=lora_options, **options)
    theirs = create_loraplus_optimizer(
        module.model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    ours = build_optimizer(module.parameter_groups(), None, 1e-4, 0.1, fused=True)

    def rates(optimizer):
        return {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}

    assert rates(ours) == rates(theirs)
    assert rates(ours).keys() == {p for p in module.parameters() if p.requires_grad}
    module.loraplus_ratio = None
    assert [set(group["params"]) for group in module.parameter_groups()] == [rates(ours).keys()]


@pytest.mark.parametrize("option", [{"loraplus_ratio": 0.5}, {"neftune_alpha": -1.0}, {"neftune_alpha": float("nan")}])
def test_a_strength_that_is_none_is_rejected(option):
    with pytest.raises(UserError, match=r"model\.\w+ is .*: expected .*, such as \d+, or null"):
        QLoRAModule("base", **option)


# ---- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "expected"),
    [(3, None, 9), (3, -1, 9), (3, 5, 5), (1, 5, 3), (-1, 5, 5), (0, None, 0)],  # 4, 4 and 2 micro-batches an epoch
)
def test_steps_are_counted_from_batches_epochs_and_limits(max_epochs, max_steps, expected):
    assert count_optimizer_steps(10, 4, max_epochs, max_steps) == expected


def rates(choice, warmup_ratio=0.0):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, choice, 10, warmup_ratio)
    found = []
    for _ in range(11):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


COSINE = [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)]


@pytest.mark.parametrize(
    ("choice", "warmup_ratio", "expected"),
    [
        ("linear", 0.0, [1 - step / 10 for step in range(11)]),
        ("cosine", 0.0, COSINE),
        ("constant", 0.0, [1.0] * 11),
        ("constant_with_warmup", 0.11, [0.0, 0.5] + [1.0] * 9),  # rounded up to whole steps
        ("constant_with_warmup", 0.09, [1.0] * 11),  # less than a step: the first one moves too
        ({"name": "cosine_with_min_lr", "min_lr_rate": 0.25}, 0.0, [0.25 + 0.75 * each for each in COSINE]),
    ],
)
def test_rates_follow_the_schedule(choice, warmup_ratio, expected):
    assert rates(choice, warmup_ratio) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ("reduce_lr_on_plateau", "expected a name among"),
        ("cosine_with_min_lr", "does not take {}.*min_lr.*Give its arguments beside the name"),
    ],
)
def test_a_schedule_that_cannot_be_built_is_refused(choice, sentence):
    with pytest.raises(UserError, match=sentence):
        rates(choice)


# ---- windows ---------------------------------------------------------------------------------------------------------


def sums(nll, tokens):
    return LossSums(torch.tensor(nll), torch.tensor(tokens), torch.tensor(0))


def parameter_with_gradient(value):
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), value)
    return parameter


@pytest.fixture
def window():
    window = Window()
    window.add(sums(6.0, 1), most=2, row_ids=[3, 1], batch="first")
    window.add(LossSums(torch.tensor(4.0, requires_grad=True), torch.tensor(4), torch.tensor(0)), most=2, row_ids=[7])
    return window


def test_gradients_of_sums_become_those_of_the_mean_over_all_tokens(window):
    parameter, unused = parameter_with_gradient(10.0), nn.Parameter(torch.zeros(2))
    loss = window.divide_gradients([parameter, unused], divided_by=2)["loss"]
    assert loss == 2.0  # (6 + 4) / (1 + 4)
    assert not loss.requires_grad
    assert parameter.grad.tolist() == [4.0, 4.0]  # 10 × 2 / 5: what Lightning has divided by is multiplied back
    assert unused.grad is None


def test_tokens_of_all_ranks_count_and_none_at_all_give_zeros_not_nan():
    window, parameter = Window(), parameter_with_gradient(10.0)
    window.add(sums(6.0, 1), most=1)
    other_rank = iter([torch.tensor([4.0, 4.0]), torch.tensor([10.0, 10.0])])  # its sums, and its gradients
    assert window.divide_gradients([parameter], 1, reduce_sum=lambda tensor: tensor + next(other_rank)) == {"loss": 2.0}
    assert parameter.grad.tolist() == [4.0, 4.0]
    assert window.labelled_tokens_of_all_ranks == 5
    window, parameter = Window(), parameter_with_gradient(0.0)
    window.add(sums(0.0, 0), most=1)
    assert window.divide_gradients([parameter], 1) == {"loss": 0.0}
    assert parameter.grad.tolist() == [0.0, 0.0]


def test_a_step_without_a_window_is_rejected():
    with pytest.raises(RuntimeError, match="call compute_loss in training_step"):
        Window().divide_gradients([], 1)


def test_an_open_window_continues_from_its_saved_state(window):
    parameter, again, other = parameter_with_gradient(10.0), Window(), nn.Parameter(torch.zeros(2))
    saved = window.state_dict({"a": parameter, "without": nn.Parameter(torch.zeros(1))})
    parameter.grad.zero_()  # the saved gradient is a copy
    again.load_state_dict(saved, {"a": other})
    assert other.grad.tolist() == [10.0, 10.0]
    assert (again.micro_batches, again.row_ids) == (2, [3, 1, 7])
    assert again.divide_gradients([other], 2) == {"loss": 2.0}
    again.load_state_dict(Window().state_dict({"a": other}), {})
    assert not again.is_open
