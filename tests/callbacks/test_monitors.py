"""Speed of a training, as it is logged."""

import itertools
from types import SimpleNamespace

import pytest
from lightning import Callback

from qlora_lightning import ThroughputMonitor
from qlora_lightning.callbacks import monitors


class Logged(Callback):
    """What was logged with each batch, and the tokens that really went through training."""

    def __init__(self):
        self.lines, self.tokens, self.labelled = [], 0, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.tokens += int(batch["cu_seqlens"][-1])
        self.labelled += int((batch["labels"] != -100).sum())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.lines.append({name: float(value) for name, value in trainer.callback_metrics.items() if "tokens" in name})


def test_the_speed_is_tokens_by_seconds_of_the_whole_window(fit, monkeypatch):
    clock = itertools.count(1.0)  # moves by a second at each look, so every micro-batch takes one
    monkeypatch.setattr(monitors, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    fit(ThroughputMonitor(), logged := Logged(), limit_train_batches=4, accumulate_grad_batches=4, limit_val_batches=1)
    expected = {
        "tokens_per_second": pytest.approx(logged.tokens / 4),
        "labelled_tokens_per_second": pytest.approx(logged.labelled / 4),
        "tokens_seen": logged.tokens,
    }
    assert logged.lines == [{}, {}, {}, expected]
