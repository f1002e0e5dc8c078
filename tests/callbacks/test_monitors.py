"""Memory and speed of a training, as they are logged."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
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


@pytest.mark.gpu
def test_on_cuda_allocated_reserved_and_a_peak_of_its_own_interval_are_logged(make_module, make_data, make_trainer):
    class Spike(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                torch.ones(512 * 1024**2 // 4, device=pl_module.device)  # freed at once

    options = {"accelerator": "cuda", "limit_train_batches": 2, "limit_val_batches": 0}
    trainer = make_trainer(GPUMemoryMonitor(), Spike(), logged := Logged("_gib"), **options)
    trainer.fit(make_module(), datamodule=make_data())
    capacity = torch.cuda.get_device_properties(0).total_memory / 2**30
    for line in logged.lines:
        assert line.keys() == {"memory_allocated_gib", "memory_reserved_gib", "memory_peak_gib"}
        assert line["memory_allocated_gib"] <= line["memory_peak_gib"] <= capacity
    assert logged.lines[0]["memory_peak_gib"] > 0.5 > logged.lines[1]["memory_peak_gib"]


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
