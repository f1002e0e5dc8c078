"""Samples that begin alike, and what of them is computed; by hand, and against the whole batch."""

import itertools

import numpy as np
import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.layout import find_needed, leave_out_unneeded
from qlora_lightning.model.loss import IGNORED, next_labels
from qlora_lightning.support.versions import enable_activation_checkpointing

SYSTEM = [1, 2, 3]


def batch_of(*samples):
    """Make a batch of (token ids, how many at the begin and at the end are not labelled)."""
    ids = [list(ids) for ids, _, _ in samples]
    labels = [
        [IGNORED] * first + row[first : len(row) - last] + [IGNORED] * last
        for row, (_, first, last) in zip(ids, samples, strict=True)
    ]
    lengths = [len(row) for row in ids]
    return {
        "input_ids": torch.tensor([[*itertools.chain(*ids)]]),
        "labels": torch.tensor([[*itertools.chain(*labels)]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        "longest": max(lengths),
    }


def leave_out(batch):
    return leave_out_unneeded({**batch, "targets": next_labels(batch["labels"][0])[None]})


def test_what_two_samples_begin_with_is_there_once_and_what_nothing_is_predicted_from_never():
    found = leave_out(batch_of(([*SYSTEM, 7, 8, 9], 4, 1), ([*SYSTEM, 5, 6], 4, 0)))
    # In the order of their ids the second comes first: it computes SYSTEM. 8 is the last label: from 7 it is predicted.
    assert found["input_ids"].tolist() == [[7, *SYSTEM, 5]]
    assert found["position_ids"].tolist() == [[3, 0, 1, 2, 3]]
    assert found["targets"].tolist() == [[8, -100, -100, -100, 6]]
    assert found["stream_places"].tolist() == [1, 2, 3, 0, 1, 2, 3, 4]
    assert found["cu_seqlens"].tolist() == [0, 4, 8]
    assert found["cu_seqlens"].dtype == torch.int32
    assert found["longest"] == 4


def test_a_token_from_which_something_is_predicted_is_not_shared():
    found = leave_out(batch_of(([*SYSTEM, 7, 8], 3, 0), ([*SYSTEM, 7, 9], 3, 0)))
    assert found["input_ids"].tolist() == [[*SYSTEM, 7, 3, 7]]
    assert found["targets"].tolist() == [[-100, -100, 7, 8, 7, 9]]


def test_beginnings_are_shared_in_a_chain():
    found = leave_out(batch_of(([1, 2, 9], 2, 0), ([1, 2, 3, 4, 9], 4, 0), ([1, 2, 3, 5, 9], 4, 0)))
    # Sorted: (1 2 3 4), (1 2 3 5), (1 2): the third computes no more than 5, the first no more than its 2.
    assert found["input_ids"].tolist() == [[2, 1, 2, 3, 4, 5]]
    assert found["stream_places"].tolist() == [1, 0, 1, 2, 3, 4, 1, 2, 3, 5]


def test_samples_without_labels_have_one_token():
    found = leave_out(batch_of(([4, 5, 6], 3, 0), ([4, 5, 6], 3, 0)))
    assert found["input_ids"].tolist() == [[4, 4]]
    assert "stream_places" not in found


def test_tokens_at_other_positions_are_other_tokens():
    batch = batch_of(([*SYSTEM, 7], 3, 0), ([*SYSTEM, 8], 3, 0))
    assert "stream_places" in leave_out(batch)
    batch["position_ids"][0, 4:] += 1
    assert "stream_places" not in leave_out(batch)


def test_positions_may_be_of_32_bits():
    batch = batch_of(([*SYSTEM, 7], 3, 0), ([*SYSTEM, 8], 3, 0))
    batch["position_ids"] = batch["position_ids"].int()
    assert "stream_places" in leave_out(batch)
    batch["position_ids"][0, 4:] += 1
    assert "stream_places" not in leave_out(batch)


@pytest.mark.parametrize("bounds", [[1, 4, 8], [0, 5, 4, 8], [0, 4, 4, 8], [0, 4, 7], [0, 4, 9]], ids=str)
def test_bounds_that_are_none_are_refused(bounds):
    batch = batch_of(([*SYSTEM, 7], 3, 0), ([*SYSTEM, 8], 3, 0))
    batch["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 8, the tokens of the batch; found"):
        leave_out(batch)


def test_a_few_shared_tokens_among_many_are_left_alone():
    rows = [np.array([1, *range(10 * row, 10 * row + 40)]) for row in (1, 9)]
    predicts = [np.arange(41) > 20] * 2
    assert find_needed(rows, predicts).shared == [0, 0]  # 1 of 82
    rows = [np.array([1, 2, 3, *range(10 * row, 10 * row + 38)]) for row in (1, 9)]
    assert find_needed(rows, predicts).shared == [0, 3]


def rows_beginning_alike(count, shared, own, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40_000, (shared,), generator=generator).tolist()
    for row in range(count):
        length = own + 7 * row
        rest = torch.randint(5, 40_000, (length,), generator=generator).tolist()
        yield [*ids, *rest], shared + length // 3, row % 3


def make(tiny_base, **options):
    module = QLoRAModule(str(tiny_base), **{"rank": 4, "compute_dtype": "fp32", **options})
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in trainable_tensors(module).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return module.train()


def results(module, batch):
    sums = module.compute_loss(batch)
    trainable = trainable_tensors(module)
    gradients = torch.autograd.grad(sums.nll_sum, list(trainable.values()))
    return [sums.nll_sum.detach(), sums.labelled_tokens, sums.correct, *gradients]


BATCHES = {
    "within a tile": [*rows_beginning_alike(4, 20, 11)],
    "over whole tiles": [*rows_beginning_alike(3, 150, 30)],
    "some over 512 tokens": [*rows_beginning_alike(2, 500, 20), *rows_beginning_alike(2, 90, 20, seed=1)],
    "two prompts": [*rows_beginning_alike(3, 40, 9), *rows_beginning_alike(3, 30, 9, seed=1)],
    "one row twice": [*rows_beginning_alike(1, 30, 9)] * 2,
}


@pytest.mark.parametrize("every_n_layers", [0, 1], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
def test_loss_and_gradients_are_those_of_the_plain_path_over_all_tokens(tiny_base, rows, every_n_layers):
    module, plain = make(tiny_base), make(tiny_base, fast=False)
    if every_n_layers:
        enable_activation_checkpointing(module.causal_lm)
    batch = batch_of(*rows)
    assert "stream_places" in leave_out(batch)
    assert module.leaves_out_unneeded
    assert not plain.leaves_out_unneeded
    for one, other in zip(results(module, batch), results(plain, batch), strict=True):
        assert (one - other).float().norm() <= 1e-5 * other.float().norm()


def test_in_bfloat16_gradients_err_no_more_than_those_of_the_plain_path(tiny_base):
    def gradient(**options):
        found = [results(make(tiny_base, **options), batch_of(*rows))[3:] for rows in BATCHES.values()]
        return torch.cat([each.flatten() for each in itertools.chain(*found)])

    exact = gradient(fast=False)
    ours, plain = gradient(compute_dtype="bf16"), gradient(compute_dtype="bf16", fast=False)
    assert (ours - exact).norm() <= 1.1 * (plain - exact).norm()


def test_labels_that_a_subclass_changes_are_seen(tiny_base):
    """What is left out follows the labels of the batch that comes, not those of the file."""
    module, plain = make(tiny_base), make(tiny_base, fast=False)
    batch = batch_of(*BATCHES["within a tile"])
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][0, batch["cu_seqlens"][:-1]] = IGNORED
    for one, other in zip(results(module, batch), results(plain, batch), strict=True):
        assert (one - other).float().norm() <= 1e-5 * other.float().norm()


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"neftune_alpha": 5.0}], ids=str)
def test_with_noise_all_tokens_are_computed_in_training_alone(tiny_base, options):
    module = make(tiny_base, **options)
    assert not module.leaves_out_unneeded
    assert module.eval().leaves_out_unneeded


def test_with_another_attention_all_tokens_are_computed(tiny_base):
    module = make(tiny_base)
    module.causal_lm.set_attn_implementation("sdpa")
    assert not module.leaves_out_unneeded


def test_dropout_that_is_put_in_later_is_noticed(tiny_base):
    module = make(tiny_base)
    assert module.leaves_out_unneeded
    module.causal_lm.model.layers[0].mlp.down_proj.lora_dropout["default"] = torch.nn.Dropout(0.5)
    assert not module.leaves_out_unneeded
