import re
from types import SimpleNamespace

import pytest
import torch

from qlora_lightning import LossSums, QLoRAModule
from qlora_lightning.callbacks.loss_spikes import LossSpikeMonitor


def trainer(**options):
    defaults = {"global_step": 0, "callback_metrics": {}, "world_size": 1, "is_global_zero": True, "datamodule": None}
    defaults["callbacks"] = []
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
    return SimpleNamespace(**{**defaults, "strategy": strategy, **options})


def feed(monitor, losses, first_step=0):
    """Take optimizer steps with these losses, of rows numbered on; as a Trainer calls it."""
    made, module = trainer(global_step=first_step), SimpleNamespace(window=SimpleNamespace(closed_row_ids=[]))
    for number, loss in enumerate(losses):
        monitor.on_train_batch_start(made, module, {}, 0)
        made.global_step += 1
        made.callback_metrics["train_loss"] = torch.tensor(loss)
        module.window.closed_row_ids = [2 * number, 2 * number + 1]
        monitor.on_train_batch_end(made, module, None, {}, 0)


@pytest.fixture
def spoken(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    return lambda: capsys.readouterr().out.splitlines()


STEADY = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8] * 5  # median 1, median absolute deviation 0.1


def test_a_spike_is_told_with_step_loss_and_rows(spoken):
    feed(LossSpikeMonitor(), [*STEADY, 1.61])
    assert spoken() == ["Loss spike: train_loss 1.61 at step 30, the median of the last 30 is 1; rows row 60, row 61."]


@pytest.mark.parametrize("last", [1.59, 0.0, float("nan"), float("inf")])
def test_what_is_not_far_above_or_not_a_number_is_no_spike(spoken, last):
    monitor = LossSpikeMonitor()
    feed(monitor, [*STEADY, last])
    assert spoken() == []
    assert all(loss == loss for loss in monitor.state_dict()["losses"])


def test_losses_that_hardly_differ_need_six_percent(spoken):
    feed(LossSpikeMonitor(), [1.0] * 30 + [1.059] + [1.0] * 29)
    assert spoken() == []
    feed(LossSpikeMonitor(), [1.0] * 30 + [1.061])
    assert len(spoken()) == 1


def test_at_most_one_line_in_ten_steps(spoken):
    feed(LossSpikeMonitor(), [*STEADY, *[9.0] * 11])
    assert [re.search(r"step (\d+)", line)[1] for line in spoken()] == ["30", "40"]


@pytest.mark.parametrize("stop", [10, 31, 35])
def test_it_goes_on_from_its_state_as_if_it_had_never_stopped(spoken, stop):
    losses = [*STEADY, *[9.0] * 12, *STEADY]
    feed(whole := LossSpikeMonitor(), losses)
    expected = spoken()
    feed(first := LossSpikeMonitor(), losses[:stop])
    again = LossSpikeMonitor()
    again.load_state_dict(first.state_dict())
    feed(again, losses[stop:], first_step=stop)
    steps = [re.search(r"step \d+", line)[0] for line in spoken()]
    assert steps == [re.search(r"step \d+", line)[0] for line in expected] == ["step 30", "step 40"]
    assert again.state_dict() == whole.state_dict()


class Spikes(QLoRAModule):
    """The loss of the fifth step is a hundredfold."""

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        return LossSums(sums.nll_sum * (100 if self.trainer.global_step == 5 else 1), *sums[1:])


def test_in_a_run_places_are_named(fit, make_module, spoken, rows_file):
    monitor = LossSpikeMonitor(least_steps=4)
    fit(monitor, module=make_module(Spikes), limit_val_batches=0)
    (line,) = [line for line in spoken() if "Loss spike" in line]
    assert re.search(r"at step 5, the median of the last 5 is .*rows\.jsonl:\d+, .*rows\.jsonl:\d+\.$", line)
