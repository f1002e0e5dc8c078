import math

import pytest
import torch
from torch import nn

from qlora_lightning.model.optimizer import build_schedule, count_optimizer_steps
from qlora_lightning.support.errors import UserError


@pytest.mark.parametrize(
    ("batches", "accumulate", "max_epochs", "max_steps", "expected"),
    [
        (10, 1, 3, None, 30),
        (10, 4, 3, None, 9),  # 4, 4 and 2 micro-batches in each epoch
        (10, 4, 3, -1, 9),
        (10, 4, 3, 5, 5),
        (10, 4, 1, 5, 3),
        (10, 4, None, 5, 5),
        (10, 4, -1, 5, 5),
        (10, 4, 0, None, 0),
    ],
)
def test_steps_are_counted_from_batches_epochs_and_limits(batches, accumulate, max_epochs, max_steps, expected):
    assert count_optimizer_steps(batches, accumulate, max_epochs, max_steps) == expected


@pytest.mark.parametrize("limits", [(None, None), (-1, -1)])
def test_a_run_without_an_end_is_refused(limits):
    with pytest.raises(UserError, match=r"set trainer.max_epochs or trainer.max_steps"):
        count_optimizer_steps(10, 1, *limits)


def rates(choice, total_steps=10, warmup_ratio=0.0):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, choice, total_steps, warmup_ratio)
    found = []
    for _ in range(total_steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_linear_falls_to_zero_at_the_last_step():
    assert rates("linear") == pytest.approx([1 - step / 10 for step in range(11)])


def test_cosine_follows_half_a_wave():
    assert rates("cosine") == pytest.approx([(1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)])


def test_constant_stays():
    assert rates("constant") == [1.0] * 11


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 0), (0.1, 1), (0.11, 2), (0.5, 5)])
def test_warm_up_rises_from_zero_over_whole_steps_rounded_up(ratio, steps):
    found = rates("constant_with_warmup", warmup_ratio=ratio)
    assert found == pytest.approx([step / steps for step in range(steps)] + [1.0] * (11 - steps))


def test_a_schedules_own_arguments_stand_beside_its_name():
    found = rates({"name": "cosine_with_min_lr", "min_lr_rate": 0.25})
    assert (found[0], found[-1]) == pytest.approx((1.0, 0.25))


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ("cosin", "'cosin': expected a name among .*cosine, "),
        ({"min_lr_rate": 0.1}, "expected a name among"),
        ("reduce_lr_on_plateau", "expected a name among"),
        ("cosine_with_min_lr", "does not take {}.*min_lr.*Give its arguments beside the name"),
        ({"name": "cosine", "min_lr_rate": 0.1}, "does not take {'min_lr_rate': 0.1}"),
    ],
)
def test_unknown_names_and_wrong_arguments_are_refused(choice, sentence):
    with pytest.raises(UserError, match=sentence):
        rates(choice)


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_warm_up_beyond_the_run_is_refused(ratio):
    with pytest.raises(UserError, match=r"in \[0, 1\)"):
        rates("cosine", warmup_ratio=ratio)
