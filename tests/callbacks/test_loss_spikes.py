import re
from types import SimpleNamespace

import pytest
import torch

from qlora_lightning import LossSums, QLoRAModule
from qlora_lightning.callbacks.loss_spikes import LossSpikeMonitor

STEADY = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8] * 5  # median 1, median absolute deviation 0.1


def feed(monitor, losses, first_step=0):
    """Take optimizer steps with these losses; as a Trainer calls it."""
    trainer = SimpleNamespace(global_step=first_step, callback_metrics={}, world_size=1, is_global_zero=True)
    trainer.callbacks, trainer.datamodule = [], None
    module = SimpleNamespace(window=SimpleNamespace(last_row_ids=[7]))
    for loss in losses:
        monitor.on_train_batch_start(trainer, module, {}, 0)
        trainer.global_step += 1
        trainer.callback_metrics["train_loss"] = torch.tensor(loss)
        monitor.on_train_batch_end(trainer, module, None, {}, 0)


@pytest.fixture
def spikes(capsys, monkeypatch):
    """Steps that were reported since the last call."""
    monkeypatch.setenv("COLUMNS", "300")
    return lambda: [
        int(step) for step in re.findall(r"Loss spike: train_loss .* at step (\d+)", capsys.readouterr().out)
    ]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([*STEADY, 1.61], [30]),
        ([*STEADY, 1.59], []),
        ([*STEADY, 0.0], []),
        ([*STEADY, float("nan"), float("inf")], []),
        ([1.0] * 30 + [1.059] + [1.0] * 29, []),  # losses that hardly differ need six percent
        ([1.0] * 30 + [1.061], [30]),
        ([*STEADY, *[9.0] * 11], [30, 40]),  # one report in ten steps
    ],
)
def test_a_spike_is_six_deviations_above_the_median(losses, expected, spikes):
    feed(monitor := LossSpikeMonitor(), losses)
    assert spikes() == expected
    assert all(loss == loss for loss in monitor.state_dict()["losses"])


@pytest.mark.parametrize("stop", [10, 31, 35])
def test_it_continues_from_its_state_as_if_it_had_never_stopped(spikes, stop):
    losses = [*STEADY, *[9.0] * 12, *STEADY]
    feed(whole := LossSpikeMonitor(), losses)
    assert spikes() == [30, 40]
    feed(first := LossSpikeMonitor(), losses[:stop])
    again = LossSpikeMonitor()
    again.load_state_dict(first.state_dict())
    feed(again, losses[stop:], first_step=stop)
    assert spikes() == [30, 40]
    assert again.state_dict() == whole.state_dict()


class Spikes(QLoRAModule):
    """The loss of step 35 is a hundredfold."""

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        return LossSums(sums.nll_sum * (100 if self.trainer.global_step == 35 else 1), *sums[1:])


def test_a_run_names_the_rows(fit, make_module, capsys, monkeypatch, rows_file):
    monkeypatch.setenv("COLUMNS", "300")
    module = make_module(Spikes, learning_rate=1e-4)
    fit(LossSpikeMonitor(), module=module, limit_val_batches=0, max_epochs=5)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Loss spike" in line]
    assert re.search(r"at step 35, the median of the last 35 is .*rows\.jsonl:\d+, .*rows\.jsonl:\d+\.$", line)
