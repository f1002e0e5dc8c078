"""What of a batch is computed: by hand, and against the whole batch."""

import itertools

import lightning
import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.model.activation_checkpointing import enable_activation_checkpointing
from qlora_lightning.model.step.layout import add_noise, lay_out, sequences_of_lengths
from qlora_lightning.sources.tensors import IGNORED
from tests.steps import assert_same_step, fit, loss_and_gradients, make_batch, make_module

SYSTEM = [1, 2, 3]


def batch_of(*samples):
    """Make a batch of (token ids, how many at the begin and at the end are not labeled)."""
    ids = [list(ids) for ids, _, _ in samples]
    labels = [
        [IGNORED] * first + row[first : len(row) - last] + [IGNORED] * last
        for row, (_, first, last) in zip(ids, samples, strict=True)
    ]
    batch = make_batch([len(row) for row in ids])
    batch["input_ids"] = torch.tensor([[*itertools.chain(*ids)]])
    batch["labels"] = torch.tensor([[*itertools.chain(*labels)]])
    return batch


def test_what_two_samples_begin_with_is_there_once_and_what_nothing_is_predicted_from_never():
    found = lay_out(batch_of(([*SYSTEM, 7, 8, 9], 4, 1), ([*SYSTEM, 5, 6], 4, 0)))
    # In the order of their ids the second comes first: it computes SYSTEM. 8 is the last label: from 7 it is predicted.
    assert found.input_ids.tolist() == [[7, *SYSTEM, 5]]
    assert found.position_ids.tolist() == [[3, 0, 1, 2, 3]]
    assert (found.predict_index.tolist(), found.targets.tolist()) == ([0, 4], [8, 6])
    assert found.labels.tolist() == [[8, IGNORED, IGNORED, IGNORED, 6]]
    assert found.sequences.cu_seqlens.tolist() == [0, 4, 8]


def rows_beginning_alike(count, shared, own, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40_000, (shared,), generator=generator).tolist()
    for row in range(count):
        length = own + 7 * row
        rest = torch.randint(5, 40_000, (length,), generator=generator).tolist()
        yield [*ids, *rest], shared + length // 3, row % 3


BATCHES = {
    "within a tile": [*rows_beginning_alike(4, 20, 11)],
    "two prompts": [*rows_beginning_alike(3, 40, 9), *rows_beginning_alike(3, 30, 9, seed=1)],
    "one row twice": [*rows_beginning_alike(1, 30, 9)] * 2,
}


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
def test_loss_and_gradients_are_those_of_the_plain_path_over_all_tokens(tiny_base, rows):
    module, plain = make_module(tiny_base), make_module(tiny_base, fast=False)
    batch = batch_of(*rows)
    assert lay_out(batch).sequences.expanded.has_shared
    expected = loss_and_gradients(plain, batch)
    assert_same_step(loss_and_gradients(module, batch), expected)
    enable_activation_checkpointing(module.causal_lm)
    assert_same_step(loss_and_gradients(module, batch), expected)


class TrainsPrompts(QLoRAModule):
    def compute_loss(self, batch):
        return super().compute_loss(batch.replace_targets(batch.targets.clamp(max=200)))


class Prompts(lightning.Callback):
    """Labels each token, in the batch itself: what a sample begins with is not predicted from the one before it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch["labels"].copy_(batch["input_ids"])
        self.labelled = batch["labels"].numel() - len(batch["row_ids"])


def test_labels_that_a_subclass_or_callback_changes_are_trained(tiny_base, rows_file, tmp_path):
    prompts = Prompts()
    trainer = fit(QLoRAModule(str(tiny_base)), tmp_path, rows_file, max_steps=1, callbacks=[prompts])
    assert trainer.lightning_module.window.totals["labelled_tokens"] == prompts.labelled
    batch, module, changed = make_batch(), make_module(tiny_base), make_module(tiny_base, cls=TrainsPrompts)
    expected = {**batch, "labels": batch["labels"].clamp(max=200)}
    assert changed.compute_loss(changed.micro_batch_of(batch)).loss_sum == module.compute_loss(expected).loss_sum


def test_noise_of_a_token_follows_the_length_of_its_own_sample():
    width, lengths, alpha = 64, [4, 100], 5.0
    torch.manual_seed(0)
    noise = add_noise(torch.zeros(1, sum(lengths), width), sequences_of_lengths(lengths), alpha)[0]
    for length, part in zip(lengths, noise.split(lengths), strict=True):
        bound = alpha / (length * width) ** 0.5
        assert 0.95 * bound < part.abs().max() <= bound
        assert part.abs().mean() == pytest.approx(bound / 2, rel=0.1)  # uniform
        # the expected norm of the whole sample's noise is alpha / sqrt(3), whatever its length
        assert part.norm() == pytest.approx(alpha / 3**0.5, rel=0.1)
