import math
import re

import pytest
import torch
from lightning import Callback

from qlora_lightning import GPUMemoryMonitor
from qlora_lightning.callbacks import gpu_memory
from qlora_lightning.callbacks.gpu_memory import device_memory_gib, read_memory

CPU = torch.device("cpu")


class Logged(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.names = {name for name in trainer.callback_metrics if name.endswith("_gib")}
        self.values = {name: float(trainer.callback_metrics[name]) for name in self.names}


def spoken(capsys):
    """What it printed, joined: rich wraps long lines."""
    return " ".join(capsys.readouterr().out.split())


def test_on_a_cpu_private_memory_and_the_peak_are_logged(fit):
    fit(GPUMemoryMonitor(), logged := Logged(), limit_train_batches=1, limit_val_batches=0)
    assert logged.names == {"private_memory_gib", "peak_rss_gib"}
    assert 0.1 < logged.values["private_memory_gib"] < logged.values["peak_rss_gib"] < device_memory_gib(CPU)


def test_it_speaks_after_loading_after_the_first_step_and_at_the_end(fit, capsys):
    fit(GPUMemoryMonitor(), limit_train_batches=3, limit_val_batches=0)
    number = r"\d+\.\d\d GiB"
    lines = re.findall(rf"Memory ([a-z ]+): {number} private memory, {number} peak rss", spoken(capsys))
    assert lines == ["after loading", "after the first step", "at the end"]


def test_the_first_step_is_the_optimizers_not_the_first_micro_batch(fit, capsys):
    fit(GPUMemoryMonitor(), BatchEnds(), limit_train_batches=3, accumulate_grad_batches=3, limit_val_batches=0)
    text = spoken(capsys)
    assert text.index("Memory after the first step") > text.index("batch 2 begins")


class BatchEnds(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        print(f"batch {batch_idx} begins")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 6),
        ({"log_every_n_steps": 2}, 3),
        pytest.param(
            {"accumulate_grad_batches": 3},
            2,
        ),
    ],
)
def test_memory_is_read_once_per_logging_interval(fit, monkeypatch, options, expected):
    # Reading resets the peak on CUDA: what is read and not logged is lost.
    reads = []
    monkeypatch.setattr(GPUMemoryMonitor, "_warn_if_full", lambda self, device, values: reads.append(values))
    fit(GPUMemoryMonitor(), limit_train_batches=6, limit_val_batches=0, **options)
    assert len(reads) == expected


def test_it_warns_once_with_remedies_when_memory_is_nearly_full(fit, monkeypatch, capsys):
    monkeypatch.setattr(gpu_memory, "device_memory_gib", lambda device: 0.01)
    fit(GPUMemoryMonitor(), limit_train_batches=3, limit_val_batches=0)
    text = spoken(capsys)
    assert text.count("GiB is over 95 % of 0.01 GiB.") == 1
    for remedy in ("gradient_checkpointing.enabled: true", "data.batch_size", "accumulate_grad_batches", "max_length"):
        assert remedy in text


@pytest.mark.parametrize(("capacity", "warns"), [(1.0, True), (1.06, False)])
def test_nearly_full_is_over_95_percent(monkeypatch, capsys, capacity, warns):
    monkeypatch.setattr(gpu_memory, "device_memory_gib", lambda device: capacity)
    GPUMemoryMonitor()._warn_if_full(CPU, {"peak_rss_gib": 1.0})
    assert bool(spoken(capsys)) == warns


def test_switched_off_it_is_silent(fit, monkeypatch, capsys):
    monkeypatch.setattr(gpu_memory, "device_memory_gib", lambda device: 0.01)
    fit(GPUMemoryMonitor(enabled=False), logged := Logged(), limit_train_batches=1, limit_val_batches=0)
    assert logged.names == set()
    assert "Memory" not in (text := spoken(capsys))
    assert "GiB" not in text


def test_private_memory_grows_by_what_is_allocated():
    before = read_memory(CPU)
    block = torch.ones(64 * 1024**2 // 4)  # 64 MiB, written to
    after = read_memory(CPU)
    grown = after["private_memory_gib"] - before["private_memory_gib"]
    assert math.isclose(grown, block.nbytes / 1024**3, rel_tol=0.2)
    assert after["peak_rss_gib"] >= before["peak_rss_gib"]


@pytest.mark.gpu
def test_on_cuda_allocated_reserved_and_a_peak_of_its_own_interval_are_logged(make_module, make_data, make_trainer):
    class Spike(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                torch.ones(512 * 1024**2 // 4, device=pl_module.device)  # freed at once

    peaks = []

    class Peaks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if name.endswith("_gib")}
            assert metrics.keys() == {"memory_allocated_gib", "memory_reserved_gib", "memory_peak_gib"}
            assert metrics["memory_allocated_gib"] <= metrics["memory_peak_gib"] <= device_memory_gib(pl_module.device)
            peaks.append(metrics["memory_peak_gib"])

    options = {"accelerator": "cuda", "limit_train_batches": 2, "limit_val_batches": 0}
    make_trainer(GPUMemoryMonitor(), Spike(), Peaks(), **options).fit(make_module(), datamodule=make_data())
    assert peaks[0] > 0.5
    assert peaks[1] < 0.5
