"""Batches and steps of a run, from the training rows and the trainer's settings."""

import lightning
import pytest
import torch

from qlora_lightning.commands import epoch as epochs
from qlora_lightning.commands.epoch import count_devices, plan_epoch
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.data.samples import SampleSetBuilder


@pytest.fixture(scope="module")
def samples():
    """Ten samples of 1 to 10 tokens, 55 in all."""
    builder = SampleSetBuilder()
    for length in range(1, 11):
        builder.add([5] * length, [-100] * length, length, 0, "train.jsonl", length)
    return builder.build()


def test_batches_of_rows_and_of_a_budget(samples):
    trainer = {"devices": 1, "max_epochs": 3, "accumulate_grad_batches": 2}
    epoch = plan_epoch(EpochPlan(samples, batch_size=4), trainer)
    assert (epoch.batches, epoch.tokens, epoch.mean_tokens, epoch.most_tokens) == (3, 55, 55 / 3, 26)
    assert (epoch.steps, epoch.all_steps, epoch.epochs, epoch.budget) == (2, 6, 3, None)
    epoch = plan_epoch(EpochPlan(samples, tokens_per_batch=11), {"devices": 1})
    assert (epoch.batches, epoch.mean_tokens, epoch.most_tokens, epoch.budget) == (5, 11.0, 11, 11)


@pytest.mark.parametrize(
    ("trainer", "steps", "all_steps", "of_epochs"),
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
    ],
)
def test_steps_follow_the_trainer(samples, trainer, steps, all_steps, of_epochs):
    epoch = plan_epoch(EpochPlan(samples, batch_size=1), {"accelerator": "cpu", **trainer})
    assert (epoch.steps, epoch.all_steps, epoch.epochs) == (steps, all_steps, of_epochs)


def test_a_stream_ends_by_steps_alone(samples):
    plan = EpochPlan(samples, batch_size=1)
    assert plan_epoch(plan, {"max_steps": 70}, streaming=True).all_steps == 70
    assert plan_epoch(plan, {"max_epochs": 3}, streaming=True).all_steps is None


class Count(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, index):
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_steps_are_those_that_lightning_makes(samples):
    settings = {"max_epochs": 2, "accumulate_grad_batches": 4, "devices": 1, "limit_train_batches": 0.7}
    settings |= {"accelerator": "cpu", "logger": False}
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(**settings, **quiet)
    trainer.fit(Count(), [0] * 10)
    assert trainer.global_step == plan_epoch(EpochPlan(samples, batch_size=1), settings).all_steps


def test_all_devices_are_those_of_this_machine(monkeypatch):
    monkeypatch.setattr(epochs.torch.cuda, "device_count", lambda: 8)
    assert count_devices({}) == count_devices({"devices": -1, "accelerator": "gpu"}) == 8
    assert count_devices({"devices": "auto", "accelerator": "cpu"}) == 1
    monkeypatch.setattr(epochs.torch.cuda, "device_count", lambda: 0)
    assert count_devices({}) == 1
