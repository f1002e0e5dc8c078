import numpy as np
import pytest

from qlora_lightning.data.batches.order import group_by_length, permute


def grouped(lengths, stride, seed=0, epoch=0):
    lengths = np.array(lengths)
    order = group_by_length(permute(len(lengths), seed, epoch), lengths, stride, seed, epoch).tolist()
    return [order[at : at + stride] for at in range(0, len(order), stride)]


def test_batches_hold_rows_of_like_length_and_the_longest_comes_first():
    lengths = [2, 9, 3, 8, 2, 9, 3, 8, 1]
    batches = [[lengths[row] for row in batch] for batch in grouped(lengths, 2)]
    assert batches[0] == [9, 9]
    assert sorted(batches[1:4]) == [[2, 2], [3, 3], [8, 8]]
    assert batches[4] == [1]  # the short batch stays last


@pytest.mark.parametrize("n", [1, 5, 8, 99, 800, 1003, 2001])
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_every_row_comes_once_and_the_longest_in_the_first_batch(n, stride):
    lengths = np.random.default_rng(n).integers(1, 500, n)
    batches = grouped(lengths, stride, seed=3, epoch=1)
    assert sorted(row for batch in batches for row in batch) == list(range(n))
    assert max(lengths[batches[0]]) == lengths.max()


def test_epochs_group_differently_and_one_epoch_always_alike():
    lengths = np.random.default_rng(0).integers(1, 500, 1000)
    first, second = grouped(lengths, 8, epoch=0), grouped(lengths, 8, epoch=1)
    assert first == grouped(lengths, 8, epoch=0)
    assert not {frozenset(batch) for batch in first[1:]} & {frozenset(batch) for batch in second[1:]}


def test_of_one_order_each_epoch_shuffles_the_batches_anew():
    order, lengths = np.arange(400), np.random.default_rng(0).integers(1, 500, 400)
    first, second = (group_by_length(order, lengths, 8, 0, epoch).reshape(50, 8).tolist() for epoch in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_lengths_in_a_batch_differ_little_but_batches_do_not_follow_in_order():
    lengths = np.random.default_rng(0).integers(1, 500, 4000)
    batches = [lengths[batch] for batch in grouped(lengths, 8)]
    assert np.mean([np.ptp(batch) for batch in batches]) < 15  # of 440 in batches at random
    means = np.array([batch.mean() for batch in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2
