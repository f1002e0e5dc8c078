import statistics
import time

import pytest
from lightning import Callback

from qlora_lightning import AdapterCheckpoint, ThroughputMonitor


class Counted(Callback):
    """What really went through training, and what was logged."""

    def __init__(self):
        self.tokens, self.labelled, self.seconds, self.logged = 0, 0, 0.0, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.tokens += int(batch["cu_seqlens"][-1])
        self.labelled += int((batch["labels"] != -100).sum())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        names = ("tokens_per_second", "labelled_tokens_per_second", "tokens_seen")
        self.logged.append({n: float(trainer.callback_metrics[n]) for n in names if n in trainer.callback_metrics})


class FakeTime:
    """A clock that moves on by a second at each look, so every micro-batch takes one."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


def test_the_speed_is_tokens_by_seconds_of_the_whole_window(fit, monkeypatch):
    monkeypatch.setattr("qlora_lightning.callbacks.throughput.time", FakeTime())
    fit(ThroughputMonitor(), counted := Counted(), limit_train_batches=3, accumulate_grad_batches=3)
    assert counted.logged == [
        {},
        {},
        {
            "tokens_per_second": pytest.approx(counted.tokens / 3),
            "labelled_tokens_per_second": pytest.approx(counted.labelled / 3),
            "tokens_seen": counted.tokens,
        },
    ]


class Slow(Callback):
    """A validation that takes longer than a training step."""

    def on_validation_batch_start(self, *_):
        time.sleep(0.4)


def test_a_slow_validation_does_not_make_training_look_slow(fit):
    began = time.perf_counter()
    fit(ThroughputMonitor(), counted := Counted(), Slow(), val_check_interval=1, limit_val_batches=1)
    assert time.perf_counter() - began > 8 * 0.4
    per_step = counted.tokens / 8
    assert statistics.median(entry["tokens_per_second"] for entry in counted.logged[1:]) > per_step / 0.4


def test_it_goes_on_counting_after_a_resume(fit, killed_fit, tmp_path):
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "limit_val_batches": 1, "val_check_interval": 3}
    fit(ThroughputMonitor(), whole := Counted(), **options)
    killed_fit(ThroughputMonitor(), AdapterCheckpoint(), after=12, **options)  # saved inside a window, after batch 11
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fit(ThroughputMonitor(), resumed := Counted(), AdapterCheckpoint(), ckpt_path=last, **options)
    assert resumed.logged[-1]["tokens_seen"] == whole.logged[-1]["tokens_seen"] == whole.tokens


def test_a_resume_inside_a_window_does_not_look_faster_than_it_was(fit, killed_fit, monkeypatch, tmp_path):
    monkeypatch.setattr("qlora_lightning.callbacks.throughput.time", FakeTime())
    options = {"accumulate_grad_batches": 4, "val_check_interval": 3, "limit_val_batches": 1}
    fit(ThroughputMonitor(), whole := Counted(), **options)
    killed_fit(ThroughputMonitor(), AdapterCheckpoint(), after=4, **options)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fit(ThroughputMonitor(), resumed := Counted(), AdapterCheckpoint(), ckpt_path=last, **options)
    assert resumed.logged[0]["tokens_per_second"] == pytest.approx(whole.logged[3]["tokens_per_second"])
