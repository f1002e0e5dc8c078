from types import SimpleNamespace

import lightning
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from qlora_lightning import AdapterCheckpoint, InstructionDataModule, QLoRAModule
from qlora_lightning.model.checkpoint.setting_changes import (
    FreshOptimizers,
    describe_changes,
    find_changes,
    trainer_settings,
)


def make(rate, decay=0.0, schedule=None, cls=torch.optim.AdamW, **options):
    """A trainer with one optimizer whose rate halves at each step."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = cls([parameter], lr=rate, weight_decay=decay, **options)
    schedule = schedule(optimizer) if schedule else LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[SimpleNamespace(scheduler=schedule)])
    trainer.configured = FreshOptimizers(trainer)
    return trainer


def step(trainer):
    parameter = trainer.optimizers[0].param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    trainer.optimizers[0].step()
    trainer.lr_scheduler_configs[0].scheduler.step()
    return trainer.optimizers[0].param_groups[0]["lr"]


def resume(new, old, stored=None):
    """As Lightning does: the checkpoint's states over what was configured."""
    stored = old.configured.state_dict() if stored is None else stored
    states = [old.optimizers[0].state_dict()]
    new.told = new.configured.replace_foreign_states(new, states, stored)
    new.optimizers[0].load_state_dict(states[0])
    new.lr_scheduler_configs[0].scheduler.load_state_dict(old.lr_scheduler_configs[0].scheduler.state_dict())
    new.configured.put_back(new, stored)
    return new


def options_of(trainer):
    (group,) = trainer.optimizers[0].param_groups
    return {name: value for name, value in group.items() if name != "params"}


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


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=0.4, total_steps=9)  # changes betas too


def test_what_a_schedule_has_changed_stays_the_checkpoints():
    old = make(0.4, schedule=one_cycle)
    step(old)
    assert options_of(old)["betas"] != options_of(make(0.4, schedule=one_cycle))["betas"]
    assert options_of(resume(make(0.4, schedule=one_cycle), old)) == options_of(old)


def test_only_what_is_configured_otherwise_rules_anew():
    old = make(0.4, decay=0.1, schedule=one_cycle)
    step(old)
    new = resume(make(0.4, decay=0.2, schedule=one_cycle), old)
    assert options_of(new) == {**options_of(old), "weight_decay": 0.2}


def test_over_a_checkpoint_that_does_not_say_how_it_was_configured_all_options_rule():
    old = make(0.4, decay=0.1)
    step(old)
    assert options_of(resume(make(0.4, decay=0.2, betas=(0.5, 0.6)), old, stored=[])) == {
        **options_of(old),
        "weight_decay": 0.2,
        "betas": (0.5, 0.6),
    }


def test_what_was_configured_is_read_back_from_a_checkpoint_as_it_was(tmp_path):
    configured = make(0.4, betas=(0.5, 0.6)).configured.state_dict()
    torch.save(configured, tmp_path / "x")
    assert torch.load(tmp_path / "x", weights_only=True) == configured
    assert configured[0]["class"] == "torch.optim.adamw.AdamW"


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("schedule", [None, lambda optimizer: StepLR(optimizer, 1)])
def test_another_optimizer_begins_with_a_fresh_state_and_the_schedule_goes_on(cls, schedule):
    old = make(0.4, schedule=schedule)
    step(old)
    new = resume(make(0.4, schedule=schedule, cls=cls), old)
    assert new.told == [
        f"The optimizer was torch.optim.adamw.AdamW and is {cls.__module__}.{cls.__name__}: it begins with a fresh "
        "state, while the learning rate's schedule goes on."
    ]
    assert options_of(new).keys() == options_of(make(0.4, cls=cls)).keys()
    assert not any("exp_avg" in state for state in new.optimizers[0].state.values())
    assert options_of(new)["lr"] == options_of(old)["lr"]
    assert step(new) == step(old)


class OneCycle(QLoRAModule):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=1e-2)
        schedule = OneCycleLR(optimizer, max_lr=1e-2, total_steps=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path):
    """Train the tiny base, two rows a step, up to a step; gives the last checkpoint."""

    def run(folder, max_steps, cls=QLoRAModule, ckpt_path=None, **settings):
        lightning.seed_everything(7, verbose=False)
        module = cls(str(tiny_base), rank=2, compute_dtype="fp32", learning_rate=1e-2, **settings)
        data = InstructionDataModule(train=str(rows_file), tokenizer=str(tiny_base), batch_size=2)
        quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            **{**quiet, "accelerator": "cpu", "devices": 1},
            max_steps=max_steps,
            default_root_dir=tmp_path / folder,
            callbacks=[AdapterCheckpoint()],
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return tmp_path / folder / "checkpoints" / "last.ckpt"

    return run


def test_a_run_whose_schedule_changes_betas_goes_on_to_the_same_bits(fit):
    whole = torch.load(fit("whole", 6, OneCycle), weights_only=True)
    again = torch.load(fit("again", 6, OneCycle, ckpt_path=fit("cut", 3, OneCycle)), weights_only=True)
    (optimizer,), (expected,) = again["optimizer_states"], whole["optimizer_states"]
    assert optimizer["param_groups"] == expected["param_groups"]
    assert again["lr_schedulers"] == whole["lr_schedulers"]
    torch.testing.assert_close(optimizer["state"], expected["state"], rtol=0, atol=0)
    torch.testing.assert_close(again["state_dict"], whole["state_dict"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bitsandbytes.optim.AdamW8bit", "torch.optim.SGD"])
def test_a_run_goes_on_with_another_optimizer(fit, capsys, name):
    again = torch.load(fit("again", 6, ckpt_path=fit("cut", 3), optimizer=name), weights_only=True)
    assert again["global_step"] == 6
    assert capsys.readouterr().out.count("it begins with a fresh state") == 1
    assert again["qlora_lightning"]["optimizers"][0]["class"].endswith(name.rpartition(".")[2])


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
