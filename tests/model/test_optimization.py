"""The optimizer, LoRA+ and the schedule."""

import math

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from qlora_lightning import LossSums
from qlora_lightning.model.step.optimization import build_optimizer, build_schedule, count_optimizer_steps
from qlora_lightning.model.step.window import Window
from tests.steps import make_module

COSINE = [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)]


def rates_of(choice, warmup_ratio=0.0):
    optimizer, rates = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), []
    schedule = build_schedule(optimizer, choice, 10, warmup_ratio)
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("lora_options", [{"use_dora": True}, {"trainable_token_indices": [3]}], ids=str)
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


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "expected"),
    [(3, None, 9), (3, 5, 5), (1, 5, 3), (-1, 5, 5), (0, None, 0)],  # 4, 4 and 2 micro-batches an epoch
)
def test_steps_are_counted_from_batches_epochs_and_limits(max_epochs, max_steps, expected):
    assert count_optimizer_steps(10, 4, max_epochs, max_steps) == expected


@pytest.mark.parametrize(
    ("choice", "warmup_ratio", "expected"),
    [
        ("linear", 0.0, [1 - step / 10 for step in range(11)]),
        ("cosine", 0.0, COSINE),
        ("constant_with_warmup", 0.11, [0.0, 0.5] + [1.0] * 9),  # rounded up to whole steps
        ("constant_with_warmup", 0.09, [1.0] * 11),  # less than a step: the first one moves too
        ({"name": "cosine_with_min_lr", "min_lr_rate": 0.25}, 0.0, [0.25 + 0.75 * each for each in COSINE]),
    ],
)
def test_rates_follow_the_schedule(choice, warmup_ratio, expected):
    assert rates_of(choice, warmup_ratio) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sums", "mean", "gradient"),
    [
        ([(6.0, 1), (4.0, 4)], 2.0, 1.0),  # 10 nats over 5 tokens; 10 / 2 / 5: fp16 has a factor of 2
        ([(0.0, 0), (0.0, 0)], 0.0, 5.0),  # zeros, not NaN: nothing is labelled, and gradients are zero then
    ],
)
def test_gradients_of_sums_become_those_of_the_mean_over_all_tokens_of_a_window(sums, mean, gradient):
    window, parameter = Window(), nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), 10.0)
    for nll, tokens in sums:
        window.add(LossSums(torch.tensor(nll), torch.tensor(tokens), torch.tensor(0)))
    found, totals = window.divide_gradients([parameter], factor=0.5)
    assert (found["loss"], totals["labelled_tokens"]) == (mean, sum(tokens for _, tokens in sums))
    assert parameter.grad.tolist() == [gradient, gradient]
