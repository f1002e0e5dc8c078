"""The order of an epoch's rows: shuffled, mixed by weight, grouped by length, shared by ranks."""

from collections import Counter

import numpy as np
import pytest
import torch

from qlora_lightning.data.batches.order import (
    choose_seed,
    count_batches,
    describe_other_seed,
    epoch_order,
    group_by_length,
    mix_sources,
    permute,
    rank_batches,
    rank_bins,
    share_out,
)
from qlora_lightning.support.errors import UserError


def test_the_order_is_a_permutation_told_by_seed_and_epoch_and_draws_from_no_global_generator():
    before = torch.get_rng_state()
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    keys = [(1, 2), (1, 2, "bins"), (1, 2, "groups"), (12,), (1, 12), (11, 2)]
    assert len({tuple(permute(50, *key)) for key in keys}) == len(keys)
    assert torch.equal(before, torch.get_rng_state())


def test_the_order_stays_the_one_in_which_saved_positions_count():
    assert epoch_order(8, 1, 2) == [1, 6, 7, 3, 2, 4, 5, 0]


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_ranks_share_each_micro_batch_and_one_without_rows_gets_a_filler():
    order = list("abcdefghij")
    assert rank_batches(order, 2, 0, 2) == [(["a", "b"], False), (["e", "f"], False), (["i"], False)]
    assert rank_batches(order, 2, 1, 2) == [(["c", "d"], False), (["g", "h"], False), (["j"], False)]
    assert [rank_batches("abcde", 2, rank, 4)[0][0] for rank in range(4)] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert rank_batches("abcde", 2, 1, 2)[1] == (["e"], True)
    bins = [["a", "b"], ["c"], ["d", "e"], ["f"], ["g", "h"]]
    assert rank_bins(bins, 0, 2) == [(["a", "b"], False), (["d", "e"], False), (["g", "h"], False)]
    assert rank_bins(bins, 1, 2) == [(["c"], False), (["f"], False), (["g"], True)]


@pytest.mark.parametrize("n", [1, 5, 8, 13])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (2, 3), (4, 2), (8, 1)])
def test_every_row_runs_once_and_windows_do_not_depend_on_ranks(n, batch_size, world_size):
    ranks = [rank_batches(range(n), batch_size, rank, world_size) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {count_batches(n, batch_size, world_size)}
    together = [
        sorted(row for batch in step if not batch.filler for row in batch.rows) for step in zip(*ranks, strict=True)
    ]
    assert together == [batch.rows for batch in rank_batches(range(n), batch_size * world_size, 0, 1)]


# ---- mixing ----------------------------------------------------------------------------------------------------------

SOURCE = np.array([0] * 7 + [1] * 3, dtype=np.int32)  # rows 0 to 6 and rows 7 to 9


def test_shares_are_in_proportion_and_sum_to_all():
    assert share_out([1, 3], 8) == [2, 6]
    assert share_out([0.5, 0.3, 0.2], 7) == [4, 2, 1]  # 3.5, 2.1, 1.4: the largest remainder is rounded up
    assert share_out([1e-9, 1], 5) == [0, 5]


@pytest.mark.parametrize("weights", [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_within_a_source_every_row_is_seen_before_any_is_seen_again(weights):
    epochs = [mix_sources(SOURCE, weights, seed=5, epoch=epoch).tolist() for epoch in range(30)]
    assert {len(epoch) for epoch in epochs} == {10}
    for rows in (range(7), range(7, 10)):
        seen = Counter()
        for epoch in epochs:
            seen.update(row for row in epoch if row in rows)
            times = [seen[row] for row in rows]
            assert max(times) - min(times) <= 1


def test_the_mix_is_told_by_seed_and_epoch_and_shuffles_sources_together():
    assert len({tuple(mix_sources(SOURCE, [1, 1], seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    source = np.repeat(np.array([0, 1], dtype=np.int32), 500)
    drawn = source[mix_sources(source, [1, 1], 0, 0)]
    assert 400 < np.count_nonzero(np.diff(drawn)) < 600  # as often as not the next row is of the other source


def test_a_weight_must_be_above_0_and_its_source_not_empty():
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"weight: expected numbers above 0, found 1, {weight}"):
            mix_sources(SOURCE, [1, weight], 0, 0)
    with pytest.raises(UserError, match="source 3 has no usable row"):
        mix_sources(SOURCE, [1, 1, 1], 0, 0)


# ---- grouping --------------------------------------------------------------------------------------------------------


def grouped(lengths, stride, seed=0, epoch=0):
    lengths = np.array(lengths)
    order = group_by_length(permute(len(lengths), seed, epoch), lengths, stride, seed, epoch).tolist()
    return [order[at : at + stride] for at in range(0, len(order), stride)]


def test_batches_hold_rows_of_like_length_the_longest_comes_first_and_a_short_batch_last():
    lengths = [2, 9, 3, 8, 2, 9, 3, 8, 1]
    batches = [[lengths[row] for row in batch] for batch in grouped(lengths, 2)]
    assert (batches[0], sorted(batches[1:4]), batches[4]) == ([9, 9], [[2, 2], [3, 3], [8, 8]], [1])


@pytest.mark.parametrize("n", [1, 8, 99, 1003, 2001])
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_every_row_comes_once_and_the_longest_in_the_first_batch(n, stride):
    lengths = np.random.default_rng(n).integers(1, 500, n)
    batches = grouped(lengths, stride, seed=3, epoch=1)
    assert sorted(row for batch in batches for row in batch) == list(range(n))
    assert max(lengths[batches[0]]) == lengths.max()


def test_epochs_group_differently_and_of_one_order_shuffle_the_batches():
    lengths = np.random.default_rng(0).integers(1, 500, 1000)
    first, second = grouped(lengths, 8, epoch=0), grouped(lengths, 8, epoch=1)
    assert not {frozenset(batch) for batch in first[1:]} & {frozenset(batch) for batch in second[1:]}
    order, lengths = np.arange(400), lengths[:400]
    first, second = (group_by_length(order, lengths, 8, 0, epoch).reshape(50, 8).tolist() for epoch in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_lengths_in_a_batch_differ_little_but_batches_do_not_follow_in_order():
    lengths = np.random.default_rng(0).integers(1, 500, 4000)
    batches = [lengths[batch] for batch in grouped(lengths, 8)]
    assert np.mean([np.ptp(batch) for batch in batches]) < 15  # of 440 in batches at random
    means = np.array([batch.mean() for batch in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


# ---- the seed --------------------------------------------------------------------------------------------------------


class Trainer:
    """Of the second of two processes, that hears the first one's seed."""

    world_size = 2

    @property
    def strategy(self):
        return self

    def broadcast(self, seed):
        return 99


def test_the_seed_is_that_of_seed_everything_else_torchs(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert choose_seed(None) == 5
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert choose_seed(None) == torch.initial_seed()
    assert choose_seed(Trainer()) == 99


@pytest.mark.parametrize(
    ("stored", "own", "asked", "told"),
    [(7, 8, "8", True), (7, 7, "7", False), (7, 8, None, False), (None, 8, "8", False)],
)
def test_another_seed_than_the_checkpoints_is_told_where_it_was_asked_for(monkeypatch, stored, own, asked, told):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    if asked:
        monkeypatch.setenv("PL_GLOBAL_SEED", asked)
    assert (describe_other_seed(stored, own) is not None) is told
