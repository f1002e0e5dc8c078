import json
import re

import pytest
import torch
from lightning import Callback
from torch import nn

from qlora_lightning import GPUMemoryMonitor, GradientCheckpointing, QLoRAModule
from qlora_lightning.callbacks import memory
from qlora_lightning.callbacks.dry_batch import DryBatch
from qlora_lightning.callbacks.memory import MemoryComparison
from qlora_lightning.model.device import device_memory_gib
from qlora_lightning.model.memory.plan import PARTS

CPU = torch.device("cpu")


class Logged(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.names = {name for name in trainer.callback_metrics if name.endswith("_gib")}
        self.values = {name: float(trainer.callback_metrics[name]) for name in self.names}


def test_on_a_cpu_private_memory_and_the_peak_are_logged(fit):
    fit(GPUMemoryMonitor(), logged := Logged(), limit_train_batches=1, limit_val_batches=0)
    assert logged.names == {"private_memory_gib", "peak_rss_gib"}
    assert 0.1 < logged.values["private_memory_gib"] < logged.values["peak_rss_gib"] < device_memory_gib(CPU)


def test_it_reports_one_number_after_loading_and_after_the_first_step(fit, capsys):
    fit(GPUMemoryMonitor(), limit_train_batches=3, limit_val_batches=0)
    lines = re.findall(r"Memory ([a-z ]+): \d+\.\d\d GiB at its peak", " ".join(capsys.readouterr().out.split()))
    assert lines == ["after loading", "after the first step"]


def test_it_warns_once_with_remedies_when_memory_is_nearly_full(fit, monkeypatch, capsys):
    monkeypatch.setattr(memory, "device_memory_gib", lambda device: 0.01)
    fit(GPUMemoryMonitor(), limit_train_batches=3, limit_val_batches=0)
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("GiB is over 95 % of 0.01 GiB.") == 1
    for remedy in ("gradient_checkpointing.enabled: true", "data.batch_size", "accumulate_grad_batches", "max_length"):
        assert remedy in text


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


# ---- planned and measured ----


def read(tmp_path):
    return json.loads((tmp_path / "run" / "plan.json").read_text())


def test_a_fit_ends_with_what_was_planned_and_measured(fit, make_module, tmp_path, capsys):
    fit(MemoryComparison(), DryBatch(), module=make_module(rank=2))
    found = read(tmp_path)
    predicted, measured = found["predicted"], found["measured"]["peak_bytes"]
    assert predicted["parts"].keys() == PARTS.keys()
    assert predicted["peak_bytes"] == sum(predicted["parts"].values())
    # A and B of seven linears in two layers, as in the tiny base
    adapters = 4 * 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert predicted["parts"]["adapters"] == predicted["parts"]["gradients"] == adapters
    assert predicted["parts"]["optimizer"] == 2 * adapters + 4 * 28
    assert measured > predicted["parts"]["process"] / 2
    assert found["measured"]["device"] == "cpu"
    out = capsys.readouterr().out
    line = re.search(r"Memory: planned [\d.]+ GiB, measured [\d.]+ GiB at its peak \(([-+][\d.]+)%\)", out)
    assert float(line[1]) == pytest.approx(100 * (measured / predicted["peak_bytes"] - 1), abs=0.1)


def test_the_largest_batch_of_the_run_is_planned(fit, make_data, tmp_path):
    fit(MemoryComparison(), DryBatch(), data=(data := make_data(batch_size=4)), max_epochs=2)
    plan = data.train_dataloader().plan
    costs = [int(plan.samples.lengths[batch.rows].sum()) for epoch in range(2) for batch in plan.batches(epoch)]
    batch = read(tmp_path)["largest_batch"]
    assert batch["tokens"] == max(costs)
    assert batch["rows"] == 4
    assert 0 < batch["labelled"] < batch["tokens"]


def test_checkpointing_is_planned(fit, tmp_path):
    fit(MemoryComparison())
    whole = read(tmp_path)["predicted"]["parts"]["activations"]
    fit(MemoryComparison(), GradientCheckpointing())
    assert read(tmp_path)["predicted"]["parts"]["activations"] < whole / 2


def test_batches_that_nobody_knows_before_are_planned_as_they_came(fit, make_data, tmp_path):
    data = make_data(batch_size=3)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())[:2]

    class Plain(type(data)):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(batches, batch_size=None)

    data.__class__ = Plain
    fit(MemoryComparison(), data=data)
    assert read(tmp_path)["largest_batch"]["tokens"] == max(batch["input_ids"].numel() for batch in batches)


class OwnModel(QLoRAModule):
    def build_model(self) -> nn.Module:
        return super().build_model()


@pytest.mark.parametrize("case", ["own model", "trial run", "failure"])
def test_nothing_is_written_where_nothing_was_planned(fit, make_module, tmp_path, case):
    class Fail(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("on purpose")

    comparison = MemoryComparison()
    if case == "own model":
        fit(comparison, module=make_module(OwnModel))
    elif case == "trial run":
        fit(comparison, fast_dev_run=True)
    else:
        with pytest.raises(RuntimeError, match="on purpose"):
            fit(comparison, Fail())
    assert not (tmp_path / "run" / "plan.json").exists()
    assert comparison._watch is None
