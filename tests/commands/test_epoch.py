"""Batches and steps of a run, from the training rows and the Trainer's settings."""

import lightning
import pytest
import torch

from qlora_lightning.commands.epoch import plan_epoch
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from tests.flat import gather

USUAL = {
    **{"accelerator": "cpu", "devices": 1, "num_nodes": 1, "max_epochs": 1, "max_steps": -1},
    **{"accumulate_grad_batches": 1, "limit_train_batches": None},
}


@pytest.fixture(scope="module")
def samples():
    """Ten samples of 1 to 10 tokens, 55 in all."""
    return gather(*(([5] * length, [-100] * length, length) for length in range(1, 11)))


def test_batches_of_rows_and_of_a_budget(samples):
    epoch = plan_epoch(EpochPlan(samples, batch_size=4), {**USUAL, "max_epochs": 3, "accumulate_grad_batches": 2})
    assert (epoch.batches, epoch.tokens, epoch.mean_tokens, epoch.most_tokens) == (3, 55, 55 / 3, 26)
    assert (epoch.steps, epoch.all_steps, epoch.epochs, epoch.all_tokens) == (2, 6, 3, 3 * 55)
    epoch = plan_epoch(EpochPlan(samples, tokens_per_batch=11), {**USUAL, "max_steps": 2})
    assert (epoch.batches, epoch.mean_tokens, epoch.most_tokens, epoch.all_tokens) == (5, 11.0, 11, 22)


class Count(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, index):
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_steps": 7, "max_epochs": None},
        {"limit_train_batches": 4, "accumulate_grad_batches": 3},
        {"limit_train_batches": 0.7, "accumulate_grad_batches": 4, "max_epochs": 2},
    ],
)
def test_steps_are_those_that_lightning_takes(samples, settings):
    settings = {**USUAL, **settings}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(**settings, **quiet)
    trainer.fit(Count(), [0] * 10)
    assert trainer.global_step == plan_epoch(EpochPlan(samples, batch_size=1), settings).all_steps


@pytest.mark.parametrize(
    ("settings", "devices"), [({"devices": "2", "num_nodes": 2}, 4), ({"devices": "0,1,"}, 2), ({"devices": "auto"}, 1)]
)
def test_rows_are_shared_by_all_devices(samples, settings, devices):
    epoch = plan_epoch(EpochPlan(samples, batch_size=1), {**USUAL, **settings})
    assert epoch.steps == -(-10 // devices)
