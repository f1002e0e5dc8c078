"""The order of an epoch's rows: shuffled, mixed by weight, grouped by length, packed, shared by ranks."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from qlora_lightning.data.batches.order import (
    best_fit,
    count_batches,
    group_by_length,
    make_count,
    mix_sources,
    permute,
    rank_batches,
    rank_bins,
    share_out,
)


def test_the_order_is_a_permutation_by_seed_and_epoch_and_draws_from_no_global_generator():
    before = torch.get_rng_state()
    assert permute(8, 1, 2).tolist() == [1, 6, 7, 3, 2, 4, 5, 0]  # in which saved positions count
    orders = {tuple(permute(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(50))}
    keys = [(1, 2), (1, 2, "bins"), (1, 2, "groups"), (12,), (1, 12), (11, 2)]
    assert len({tuple(permute(50, *key)) for key in keys}) == len(keys)
    assert torch.equal(before, torch.get_rng_state())


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


def test_the_mix_depends_on_seed_and_epoch_and_shuffles_sources_together():
    assert len({tuple(mix_sources(SOURCE, [1, 1], seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    source = np.repeat(np.array([0, 1], dtype=np.int32), 500)
    drawn = source[mix_sources(source, [1, 1], 0, 0)]
    assert 400 < np.count_nonzero(np.diff(drawn)) < 600  # as often as not the next row is of the other source


# ---- grouping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 8, 99, 1003, 2001])
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_grouped_rows_come_once_the_longest_in_the_first_batch_and_the_short_batch_last(n, stride):
    lengths = np.random.default_rng(n).integers(1, 500, n)
    orders = [
        group_by_length(permute(n, 3, epoch), lengths, stride, seed=3, epoch=epoch).tolist() for epoch in range(2)
    ]
    for order in orders:
        assert sorted(order) == list(range(n))
        batches = [lengths[order[at : at + stride]] for at in range(0, n - stride + 1, stride)]
        assert not batches or batches[0].max() == lengths.max()
        if n > 1000 and stride > 1:  # of like length, and not one after the other by length
            assert np.mean([np.ptp(batch) for batch in batches]) < 25
            means = np.array([batch.mean() for batch in batches])
            assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3
    assert n < 50 or orders[0] != orders[1]


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_each_row_goes_where_it_leaves_the_least_room_in_the_order_of_the_epoch():
    # 6 opens a bin, 5 another, 4 fits beside 6 (room 4, none left), 3 beside 5 (room 5), and 2 beside both
    assert best_fit([2, 6, 3, 5, 4], range(5), 10) == [[1, 4], [3, 2, 0]]
    assert best_fit([5, 5, 5, 5], [2, 0, 3, 1], 10) == [[2, 0], [3, 1]]
    assert best_fit([4, 6], [0, 1, 0], 10) == [[1, 0], [0]]  # a row that is taken twice is packed twice
    assert best_fit([], [], 10) == []


def plain_best_fit(lengths, order, budget):
    """Count bins the slow way: look at every bin for every row."""
    rooms = []
    for size in sorted((lengths[row] for row in order), reverse=True):
        fitting = [room for room in rooms if room >= size]
        rooms.append(budget)
        rooms.remove(min(fitting, default=budget))
        rooms.append(min(fitting, default=budget) - size)
        if fitting:
            rooms.remove(budget)
    return len(rooms)


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_packed_once_within_the_budget_into_a_number_of_bins_that_no_order_changes(seed):
    rng = random.Random(seed)
    budget = rng.randrange(10, 40)
    lengths = [rng.randrange(1, budget + 1) for _ in range(rng.randrange(1, 60))]
    packed = [best_fit(lengths, permute(len(lengths), seed, epoch), budget) for epoch in range(4)]
    for bins in packed:
        assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
        assert all(0 < sum(lengths[row] for row in rows) <= budget for rows in bins)
        assert lengths[bins[0][0]] == max(lengths)
    assert {len(bins) for bins in packed} == {plain_best_fit(lengths, range(len(lengths)), budget)}


def test_epochs_share_few_bins_and_are_at_least_98_percent_full():
    # lengths as those of GSM8K's 7,473 training rows: from 97 to 570 tokens, 217 on average
    lengths = np.clip(np.random.default_rng(0).lognormal(5.33, 0.31, 7473), 97, 570).astype(int)
    first, second = (best_fit(lengths, permute(7473, 1, epoch), 2048) for epoch in range(2))
    assert lengths.sum() >= 0.98 * 2048 * len(first)
    same = {frozenset(rows) for rows in first} & {frozenset(rows) for rows in second}
    assert len(same) < 0.01 * len(first)


def test_too_many_bins_lose_the_emptiest_too_few_are_cut_in_two():
    bins, lengths = [[0, 1], [2], [3, 4, 5]], [4, 4, 3, 2, 2, 1]
    assert make_count(bins, lengths, 3) == bins
    assert make_count(bins, lengths, 2) == [[0, 1], [3, 4, 5]]
    assert make_count(bins, lengths, 5) == [[0], [2], [3, 5], [4], [1]]
