import pytest

from qlora_lightning.commands.inspect import epoch as epoch_module
from qlora_lightning.commands.inspect.epoch import count_devices, plan_epoch
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.support.errors import UserError


@pytest.fixture
def plan(sample_set):
    """Ten samples of 1 to 10 tokens, 55 in all."""
    return lambda **settings: EpochPlan(sample_set(*("x" * n for n in range(1, 11))), **settings)


def test_batches_of_rows(plan):
    epoch = plan_epoch(plan(batch_size=4), {"devices": 1, "max_epochs": 3, "accumulate_grad_batches": 2})
    assert (epoch.batches, epoch.tokens, epoch.mean_tokens, epoch.most_tokens) == (3, 55, 55 / 3, 26)
    assert (epoch.steps, epoch.all_steps, epoch.epochs) == (2, 6, 3)
    assert epoch.fill is None


def test_batches_of_a_budget_are_filled(plan):
    epoch = plan_epoch(plan(tokens_per_batch=11), {"devices": 1})
    assert (epoch.batches, epoch.mean_tokens, epoch.most_tokens) == (5, 11.0, 11)
    assert epoch.fill == 1.0


@pytest.mark.parametrize(
    ("trainer", "steps", "all_steps", "epochs"),
    [
        ({}, 10, 10, 1),
        ({"devices": 2}, 5, 5, 1),
        ({"devices": [0, 1, 2, 3]}, 3, 3, 1),
        ({"devices": "0,1,"}, 5, 5, 1),
        ({"devices": "2", "num_nodes": 2}, 3, 3, 1),
        ({"max_steps": 7, "max_epochs": -1}, 10, 7, None),
        ({"max_steps": 7, "max_epochs": 5}, 10, 7, 5),
        ({"max_steps": 70, "max_epochs": 2}, 10, 20, 2),
        ({"max_epochs": -1}, 10, None, None),
        ({"max_epochs": None, "max_steps": None}, 10, 10, 1),
        ({"limit_train_batches": 4, "accumulate_grad_batches": 3}, 2, 2, 1),
        ({"limit_train_batches": 0.5}, 5, 5, 1),
    ],
)
def test_steps_follow_the_trainer(plan, trainer, steps, all_steps, epochs):
    epoch = plan_epoch(plan(batch_size=1), {"accelerator": "cpu", **trainer})
    assert (epoch.steps, epoch.all_steps, epoch.epochs) == (steps, all_steps, epochs)


def test_a_stream_ends_by_steps_alone(plan):
    assert plan_epoch(plan(batch_size=1), {"max_steps": 70}, streaming=True).all_steps == 70
    assert plan_epoch(plan(batch_size=1), {"max_epochs": 3}, streaming=True).all_steps is None


def test_steps_are_those_that_lightning_makes(plan):
    import lightning

    class Count(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            import torch

            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, index):
            return self.weight * 1.0

        def configure_optimizers(self):
            import torch

            return torch.optim.SGD(self.parameters(), 0.1)

    settings = {"max_epochs": 2, "accumulate_grad_batches": 4, "devices": 1, "limit_train_batches": 0.7}
    trainer = lightning.Trainer(
        **settings, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Count(), [0] * 10)
    assert trainer.global_step == plan_epoch(plan(batch_size=1), {**settings, "accelerator": "cpu"}).all_steps


def test_all_devices_are_those_of_this_machine(monkeypatch):
    monkeypatch.setattr(epoch_module.torch.cuda, "device_count", lambda: 8)
    assert count_devices({}) == count_devices({"devices": -1, "accelerator": "gpu"}) == 8
    assert count_devices({"devices": "auto", "accelerator": "cpu"}) == 1
    monkeypatch.setattr(epoch_module.torch.cuda, "device_count", lambda: 0)
    assert count_devices({}) == 1


@pytest.mark.parametrize("value", ["two", True, 0, 1.5])
def test_a_setting_that_is_no_count_is_refused(plan, value):
    with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches is .*: expected"):
        plan_epoch(plan(batch_size=1), {"accumulate_grad_batches": value})
