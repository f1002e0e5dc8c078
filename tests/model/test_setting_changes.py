from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from qlora_lightning.model.setting_changes import FreshOptimizers, describe_changes, find_changes, trainer_settings


def make(rate, decay=0.0, schedule=None):
    """A trainer with one optimizer whose rate halves at each step."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=rate, weight_decay=decay)
    schedule = schedule(optimizer) if schedule else LambdaLR(optimizer, lambda step: 0.5**step)
    return SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[SimpleNamespace(scheduler=schedule)])


def step(trainer):
    parameter = trainer.optimizers[0].param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    trainer.optimizers[0].step()
    trainer.lr_scheduler_configs[0].scheduler.step()
    return trainer.optimizers[0].param_groups[0]["lr"]


def resume(new, old):
    """As Lightning does: the checkpoint's states over what was configured."""
    fresh = FreshOptimizers(new)
    new.optimizers[0].load_state_dict(old.optimizers[0].state_dict())
    new.lr_scheduler_configs[0].scheduler.load_state_dict(old.lr_scheduler_configs[0].scheduler.state_dict())
    fresh.put_back(new)
    return new


def test_a_new_learning_rate_and_weight_decay_rule_after_a_resume():
    old = make(rate=0.4, decay=0.1)
    step(old)
    new = resume(make(rate=0.8, decay=0.0), old)
    group = new.optimizers[0].param_groups[0]
    assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (0.4, 0.8, 0.0)
    assert [step(new), step(new)] == [0.2, 0.1]


def test_the_moments_stay_the_checkpoints():
    old = make(rate=0.4)
    step(old)
    (moments,) = resume(make(rate=0.8), old).optimizers[0].state.values()
    assert moments["step"] == 1
    assert moments["exp_avg"] == pytest.approx(0.1)


def test_the_same_settings_go_on_to_the_same_bits():
    old = make(rate=0.3, decay=0.7)
    step(old)
    new = resume(make(rate=0.3, decay=0.7), old)
    assert new.optimizers[0].state_dict()["param_groups"] == old.optimizers[0].state_dict()["param_groups"]
    assert [step(new), step(new)] == [step(old), step(old)]


def test_a_schedule_whose_rate_does_not_follow_from_the_step_keeps_the_checkpoints():
    old = make(0.4, schedule=lambda optimizer: StepLR(optimizer, 1))
    step(old)
    new = resume(make(0.8, schedule=lambda optimizer: StepLR(optimizer, 1)), old)
    assert new.optimizers[0].param_groups[0]["lr"] == old.optimizers[0].param_groups[0]["lr"]


def test_changes_are_listed_where_both_sides_know_a_setting():
    changes = find_changes({"a": 1, "b": None, "old": 1, "c": [1]}, {"a": 2, "b": "x", "new": 2, "c": [1]}, "model")
    assert changes == [("model.a", 1, 2), ("model.b", None, "x")]
    assert describe_changes(changes).splitlines()[1:] == ["  model.a: 1 → 2", "  model.b: null → x"]


def test_the_trainers_settings_are_plain_values():
    trainer = SimpleNamespace(max_epochs=2, max_steps=-1, precision=SimpleNamespace, world_size=2)
    settings = trainer_settings(trainer)
    assert settings["max_epochs"] == 2
    assert settings["gradient_clip_val"] is None
    assert isinstance(settings["precision"], str)
