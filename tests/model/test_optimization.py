"""The optimizer, LoRA+ and the schedule."""

import math

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from qlora_lightning.model.step.optimizer import build_schedule, choose_learning_rate, choose_optimizer
from tests.steps import make_module

COSINE = [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)]


def rates_of(choice, warmup=0.0):
    optimizer, rates = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), []
    schedule = build_schedule(optimizer, choice, 10, warmup)
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("width", "rate"), [(8192, 1.165e-4), (4096, 2e-4), (2048, 3.434e-4), (576, 9.237e-4)])
def test_the_learning_rate_of_auto_falls_with_the_bases_width(width, rate):
    assert choose_learning_rate("auto", width) == pytest.approx(rate, rel=1e-3)
    assert choose_learning_rate("auto", width, preferences=True) == pytest.approx(rate / 10, rel=1e-3)
    assert choose_learning_rate(3e-4, width) == 3e-4


@pytest.mark.parametrize("lora_options", [{"use_dora": True}, {"trainable_token_indices": [3]}], ids=str)
def test_lora_plus_gives_each_tensor_the_rate_that_peft_gives_it(tiny_base, lora_options):
    options = {"loraplus_ratio": 16.0, "learning_rate": 1e-4, "weight_decay": 0.1, "quantization": "none"}
    module = make_module(tiny_base, lora_options=lora_options, **options)
    settings = {"lr": 1e-4, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}
    theirs = create_loraplus_optimizer(module.model, torch.optim.AdamW, **settings)
    kind, arguments = choose_optimizer(None, 1e-4, 0.1)
    ours = kind(module.parameter_groups(), **arguments)

    def rates(optimizer):
        return {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}

    assert rates(ours) == rates(theirs)
    assert rates(ours).keys() == {p for p in module.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("choice", "warmup", "expected"),
    [
        ("linear", 0.0, [1 - step / 10 for step in range(11)]),
        ("cosine", 0.0, COSINE),
        ("constant_with_warmup", 0.11, [0.0, 0.5] + [1.0] * 9),  # rounded up to whole steps
        ("constant_with_warmup", 2, [0.0, 0.5] + [1.0] * 9),
        ("constant_with_warmup", 1, [0.0] + [1.0] * 10),
        ("constant_with_warmup", 0.09, [1.0] * 11),  # less than a step: the first one moves too
        ({"name": "cosine_with_min_lr", "min_lr_rate": 0.25}, 0.0, [0.25 + 0.75 * each for each in COSINE]),
    ],
)
def test_rates_follow_the_schedule(choice, warmup, expected):
    assert rates_of(choice, warmup) == pytest.approx(expected)
