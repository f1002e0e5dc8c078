"""Memory and speed of a training, as they are logged."""

import itertools
import re
from types import SimpleNamespace

import pytest
from lightning import Callback

from qlora_lightning import GPUMemoryMonitor, ThroughputMonitor
from qlora_lightning.callbacks import monitors


class Logged(Callback):
    """What was logged with each batch, and the tokens that really went through training."""

    def __init__(self, *endings):
        self.endings, self.lines, self.tokens, self.labelled = endings, [], 0, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.tokens += int(batch["cu_seqlens"][-1])
        self.labelled += int((batch["labels"] != -100).sum())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.endswith(self.endings)}
        self.lines.append(found)


def test_on_a_cpu_private_memory_and_the_peak_are_logged(fit, capsys):
    fit(GPUMemoryMonitor(), logged := Logged("_gib"), limit_train_batches=3, limit_val_batches=0)
    assert all(line.keys() == {"private_memory_gib", "peak_rss_gib"} for line in logged.lines)
    assert 0.1 < logged.lines[0]["private_memory_gib"] < logged.lines[0]["peak_rss_gib"]
    assert re.search(r"Memory after loading: \d+\.\d\d GiB at its peak", capsys.readouterr().out)


def test_the_speed_is_tokens_by_seconds_of_the_whole_window(fit, monkeypatch):
    clock = itertools.count(1.0)  # moves by a second at each look, so every micro-batch takes one
    monkeypatch.setattr(monitors, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    logged = Logged("tokens_per_second", "tokens_seen")
    fit(ThroughputMonitor(), logged, limit_train_batches=4, accumulate_grad_batches=4, limit_val_batches=1)
    expected = {
        "tokens_per_second": pytest.approx(logged.tokens / 4),
        "labelled_tokens_per_second": pytest.approx(logged.labelled / 4),
        "tokens_seen": logged.tokens,
    }
    assert logged.lines == [{}, {}, {}, expected]
