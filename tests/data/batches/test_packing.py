import random

import numpy as np
import pytest

from qlora_lightning.data.batches.order import permute
from qlora_lightning.data.batches.packing import best_fit, make_count
from qlora_lightning.support.errors import UserError


def test_each_row_goes_where_it_leaves_the_least_room():
    lengths = [2, 6, 3, 5, 4]
    # 6 opens a bin, 5 another, 4 fits beside 6 (room 4, none left), 3 beside 5 (room 5), and 2 beside both
    assert best_fit(lengths, range(5), 10) == [[1, 4], [3, 2, 0]]


def test_rows_of_one_length_take_their_turn_in_the_order():
    assert best_fit([5, 5, 5, 5], [2, 0, 3, 1], 10) == [[2, 0], [3, 1]]
    assert best_fit([5, 5, 5, 5], [1, 2, 3, 0], 10) == [[1, 2], [3, 0]]


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


def test_a_row_asked_for_twice_is_packed_twice():
    assert best_fit([4, 6], [0, 1, 0], 10) == [[1, 0], [0]]


def test_no_rows_need_no_bins():
    assert best_fit([], [], 10) == []


def test_a_row_above_the_budget_is_refused():
    with pytest.raises(UserError, match="tokens_per_batch: expected at least 11, the tokens of a row, found 10"):
        best_fit([4, 11], [0, 1], 10)


def test_too_many_bins_lose_the_emptiest_too_few_are_cut_in_two():
    bins, lengths = [[0, 1], [2], [3, 4, 5]], [4, 4, 3, 2, 2, 1]
    assert make_count(bins, lengths, 3) == bins
    assert make_count(bins, lengths, 2) == [[0, 1], [3, 4, 5]]
    assert make_count(bins, lengths, 5) == [[0], [2], [3, 5], [4], [1]]
    with pytest.raises(ValueError, match="6 rows cannot make 7 bins"):
        make_count(bins, lengths, 7)
