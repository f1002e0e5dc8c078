import re
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback

from qlora_lightning import InstructionDataModule, LossSums, QLoRAModule
from qlora_lightning.callbacks.dry_batch import DryBatch, find_largest
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.data.batches.loader import FlatLoader
from qlora_lightning.support.errors import UserError
from tests.flat import gather

LINE = re.compile(r"Dry run of the largest batch \(2 rows, 400 tokens,")


def samples_of(lengths):
    """Rows of these lengths, all of their tokens but the first labelled."""
    return gather(*(([*range(5, 5 + n)], [*range(5, 5 + n)], row) for row, n in enumerate(lengths)))


def largest(loader, epoch=0, max_epochs=1):
    """The largest batch to come of a fit with this loader, or None."""
    trainer = SimpleNamespace(train_dataloader=loader, num_training_batches=len(loader))
    trainer.current_epoch, trainer.max_epochs = epoch, max_epochs
    return find_largest(trainer, None)


# ---- which batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "batch_size", "rows"),
    [
        ([3, 3, 9, 1, 6, 6, 2, 2], 2, [4, 5]),  # the most tokens, not the longest row
        ([10, 12], 1, None),
        ([10, 13], 1, [1]),  # it must have more than a fifth more tokens than the first
    ],
)
def test_the_largest_has_the_most_tokens_if_it_is_worth_a_run(lengths, batch_size, rows):
    found = largest(FlatLoader(EpochPlan(samples_of(lengths), batch_size)))
    assert rows == (None if found is None else found["row_ids"].tolist())


@pytest.mark.parametrize(("epoch", "max_epochs", "end"), [(0, 3, 3), (1, 3, 3), (0, 12, 10), (11, 12, 12), (2, -1, 3)])
def test_epochs_that_are_to_come_count_up_to_ten(epoch, max_epochs, end):
    lengths = [1, 2, 4, 8, 16, 32, 64, 128]  # each pair of rows has its own sum
    loader = FlatLoader(EpochPlan(samples_of(lengths), 2, shuffle=True, seed=5))
    loader.sampler.set_epoch(epoch)
    tokens = [sum(lengths[row] for row in rows) for each in range(epoch, end) for rows, _ in loader.plan.batches(each)]
    found = largest(loader, epoch, max_epochs)
    assert (found is None) == (max(tokens) <= 1.2 * tokens[0])
    if found is not None:
        assert found["input_ids"].numel() == max(tokens)


def test_in_the_epoch_at_hand_only_what_is_left_counts():
    loader = FlatLoader(EpochPlan(samples_of([3, 9, 3, 5]), 1))
    assert largest(loader)["row_ids"].tolist() == [1]
    batches = iter(loader)
    next(batches)
    assert largest(loader) is None  # it is the very next
    next(batches)
    assert largest(loader)["row_ids"].tolist() == [3]
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


class DrawsAndLogs(QLoRAModule):
    """Draws a number, and logs, where it computes its loss."""

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        self.log("drawn", torch.rand(1).item())
        return LossSums(sums.nll_sum * (1 + torch.rand(())), *sums[1:])


def test_with_and_without_it_everything_is_bit_equal(fit, make_module, adapter_of, assert_same, capsys, long_last):
    results = []
    for callback in (DryBatch(), DryBatch(enabled=False)):
        module = make_module(DrawsAndLogs, dropout=0.3)
        trainer, _ = fit(callback, losses := Losses(), seen := Batches(), module=module, data=long_last(), max_epochs=2)
        states = {str(key): state["exp_avg_sq"] for key, state in trainer.optimizers[0].state_dict()["state"].items()}
        results.append((adapter_of(module), states, losses.values, seen.rows))
    assert len(LINE.findall(capsys.readouterr().out)) == 1
    (adapter, states, losses, rows), (other_adapter, other_states, other_losses, other_rows) = results
    assert_same(adapter, other_adapter)
    assert_same(states, other_states)
    assert losses == other_losses
    assert rows == other_rows


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"limit_train_batches": 4}])
def test_it_is_left_out_in_a_fast_dev_run_and_if_it_is_not_worth_it(fit, long_last, capsys, options):
    fit(DryBatch(), data=long_last(), **options)
    assert not LINE.search(capsys.readouterr().out)


class MemoryRunsOut(QLoRAModule):
    def compute_loss(self, batch):
        if batch["input_ids"].numel() == 400:
            raise torch.OutOfMemoryError
        return super().compute_loss(batch)


def test_memory_runs_out_before_the_first_step(fit, make_module, long_last):
    with pytest.raises(
        UserError, match=r"Out of memory on cpu in a batch of 2 rows and 400 tokens, the longest row 200;"
    ):
        fit(DryBatch(), seen := Batches(), module=make_module(MemoryRunsOut), data=long_last())
    assert seen.rows == []
