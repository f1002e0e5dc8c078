import json
import re

import pytest
import torch
from lightning import Callback
from torch import nn

from qlora_lightning import GradientCheckpointing, QLoRAModule
from qlora_lightning.callbacks import memory_comparison
from qlora_lightning.callbacks.dry_batch import DryBatch
from qlora_lightning.callbacks.memory_comparison import MemoryComparison, describe
from qlora_lightning.model.memory.plan import PARTS


def read(tmp_path):
    return json.loads((tmp_path / "run" / "plan.json").read_text())


class Hoard(Callback):
    """Take memory during one step, and give it back."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        torch.ones(300_000_000, dtype=torch.uint8)


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
    line = re.search(r"Memory: planned \S+ .B, measured \S+ .B at the most \(([-+][\d.]+)%\)", out)
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


def test_a_peak_within_a_step_is_seen(fit, tmp_path):
    fit(MemoryComparison(), limit_train_batches=2)
    usual = read(tmp_path)["measured"]["peak_bytes"]
    fit(MemoryComparison(), Hoard(), limit_train_batches=2)
    assert read(tmp_path)["measured"]["peak_bytes"] > usual + 200_000_000


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


def test_the_sentence_tells_the_error():
    assert describe(1_000_000_000, 1_050_000_000) == "Memory: planned 1.0 GB, measured 1.1 GB at the most (+5.0%)"
    assert memory_comparison.describe(200, 100).endswith("(-50.0%)")
