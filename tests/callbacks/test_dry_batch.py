import re
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback

from qlora_lightning import InstructionDataModule, LossSums, QLoRAModule
from qlora_lightning.callbacks import dry_batch
from qlora_lightning.callbacks.dry_batch import DryBatch, find_largest
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.data.batches.loader import FlatLoader
from qlora_lightning.support.errors import UserError
from tests.flat import gather

LINE = re.compile(
    r"Dry run of the largest batch \((\d+) rows, (\d+) tokens, the longest row (\d+)\): \d+\.\d s, peak \d+\.\d\d GiB"
)


def samples_of(lengths):
    """Rows of these lengths, all of their tokens but the first labelled."""
    return gather(*(([*range(5, 5 + n)], [*range(5, 5 + n)], row) for row, n in enumerate(lengths)))


def trainer_of(loader, **options):
    """What find_largest asks of a Trainer."""
    defaults = {"train_dataloader": loader, "num_training_batches": len(loader), "current_epoch": 0, "max_epochs": 1}
    return SimpleNamespace(**{**defaults, **options})


def largest(lengths, batch_size=2, trainer=None, **options):
    """The rows of the largest batch, or None."""
    loader = FlatLoader(EpochPlan(samples_of(lengths), batch_size, **options))
    found = find_largest(trainer_of(loader, **(trainer or {})), None)
    return None if found is None else found["row_ids"].tolist()


# ---- which batch -----------------------------------------------------------------------------------------------------


def test_the_one_with_most_tokens_not_that_with_the_longest_row():
    assert largest([3, 3, 9, 1, 6, 6, 2, 2]) == [4, 5]


@pytest.mark.parametrize(("second", "found"), [(12, None), (13, [1])])
def test_it_must_have_more_than_a_fifth_more_tokens_than_the_first(second, found):
    assert largest([10, second], batch_size=1) == found


@pytest.fixture
def always_worth_it(monkeypatch):
    monkeypatch.setattr(dry_batch, "_WORTH", 0.0)


@pytest.mark.parametrize(("now", "epochs"), [(0, 1), (0, 3), (1, 3), (0, 12), (11, 12), (2, None), (2, -1)])
def test_epochs_that_are_to_come_count_up_to_ten(now, epochs, always_worth_it):
    lengths = [1, 2, 4, 8, 16, 32, 64, 128]  # each pair of rows has its own sum
    loader = FlatLoader(EpochPlan(samples_of(lengths), 2, shuffle=True, seed=3))
    loader.sampler.set_epoch(now)
    tokens = [[sum(lengths[row] for row in rows) for rows, _ in loader.plan.batches(epoch)] for epoch in range(12)]
    found = find_largest(trainer_of(loader, current_epoch=now, max_epochs=epochs), None)
    end = now + 1 if epochs in (None, -1) else min(epochs, now + 10)
    assert found["input_ids"].numel() == max(map(max, tokens[now:end]))


def test_in_the_epoch_at_hand_only_what_is_left_counts():
    loader = FlatLoader(EpochPlan(samples_of([3, 9, 3, 5]), 1))
    assert find_largest(trainer_of(loader), None)["row_ids"].tolist() == [1]
    batches = iter(loader)
    next(batches)
    assert find_largest(trainer_of(loader), None) is None  # the largest is the very next
    next(batches)
    assert find_largest(trainer_of(loader), None)["row_ids"].tolist() == [3]
    assert len(list(batches)) == 2  # the loader's place is as before


# ---- in a run --------------------------------------------------------------------------------------------------------


class LongLast(InstructionDataModule):
    """Four batches of 20 tokens, then one of 400."""

    def train_dataloader(self):
        return FlatLoader(EpochPlan(samples_of([10] * 8 + [200] * 2), 2))


@pytest.fixture
def long_last(tokenizer, rows_file):
    return lambda: LongLast(train=str(rows_file), tokenizer=tokenizer)


class Batches(Callback):
    """Notes the rows of each batch that is trained on."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(batch["row_ids"].tolist())


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture
def spoken(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    return lambda: [LINE.fullmatch(line) for line in capsys.readouterr().out.splitlines() if line.startswith("Dry run")]


class DrawsAndLogs(QLoRAModule):
    """Draws a number, and logs, where it computes its loss."""

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        self.log("drawn", torch.rand(1).item())
        return LossSums(sums.nll_sum * (1 + torch.rand(())), *sums[1:])


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_with_and_without_it_everything_is_bit_equal(
    fit, make_module, adapter_of, assert_same, spoken, long_last, quantization
):
    results = []
    for callback in (DryBatch(), DryBatch(enabled=False)):
        module = make_module(DrawsAndLogs, dropout=0.3, quantization=quantization)
        trainer, _ = fit(callback, losses := Losses(), seen := Batches(), module=module, data=long_last(), max_epochs=2)
        states = {str(key): state["exp_avg_sq"] for key, state in trainer.optimizers[0].state_dict()["state"].items()}
        results.append((adapter_of(module), states, losses.values, seen.rows))
    assert len(spoken()) == 1
    (adapter, states, losses, rows), (other_adapter, other_states, other_losses, other_rows) = results
    assert_same(adapter, other_adapter)
    assert_same(states, other_states)
    assert losses == other_losses
    assert rows == other_rows


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"limit_train_batches": 4}])
def test_it_is_left_out_in_a_fast_dev_run_or_where_it_is_not_worth_it(fit, long_last, spoken, options):
    fit(DryBatch(), data=long_last(), **options)
    assert spoken() == []


class MemoryRunsOut(QLoRAModule):
    def compute_loss(self, batch):
        if batch["input_ids"].numel() == 400:
            torch.empty(1 << 60, dtype=torch.uint8)
        return super().compute_loss(batch)


def test_memory_runs_out_before_the_first_step(fit, make_module, long_last):
    with pytest.raises(
        UserError, match=r"Out of memory on cpu in a batch of 2 rows and 400 tokens, the longest row 200;"
    ):
        fit(DryBatch(), seen := Batches(), module=make_module(MemoryRunsOut), data=long_last())
    assert seen.rows == []
