from collections import Counter

import numpy as np
import pytest

from qlora_lightning.data.batches.order import mix_sources, share_out
from qlora_lightning.support.errors import UserError

SOURCE = np.array([0] * 7 + [1] * 3, dtype=np.int32)  # rows 0 to 6 and rows 7 to 9


def test_shares_are_in_proportion_and_sum_to_all():
    assert share_out([1, 3], 8) == [2, 6]
    assert share_out([1, 1, 1], 10) == [4, 3, 3]
    assert share_out([0.5, 0.3, 0.2], 7) == [4, 2, 1]  # 3.5, 2.1, 1.4: the largest remainder is rounded up
    assert share_out([1e-9, 1], 5) == [0, 5]


def test_an_epoch_holds_the_share_of_each_source():
    for epoch in range(5):
        rows = mix_sources(SOURCE, [1, 1], seed=0, epoch=epoch)
        assert Counter(SOURCE[rows].tolist()) == {0: 5, 1: 5}


@pytest.mark.parametrize("weights", [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_within_a_source_every_row_is_seen_before_any_is_seen_again(weights):
    epochs = [mix_sources(SOURCE, weights, seed=5, epoch=epoch).tolist() for epoch in range(30)]
    for rows in (range(7), range(7, 10)):
        seen = Counter()
        for epoch in epochs:
            seen.update(row for row in epoch if row in rows)
            times = [seen[row] for row in rows]
            assert max(times) - min(times) <= 1


def test_the_mix_is_told_by_seed_and_epoch():
    assert np.array_equal(mix_sources(SOURCE, [1, 1], 1, 2), mix_sources(SOURCE, [1, 1], 1, 2))
    mixes = {tuple(mix_sources(SOURCE, [1, 1], seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(mixes) == 16


def test_sources_are_shuffled_together():
    source = np.repeat(np.array([0, 1], dtype=np.int32), 500)
    drawn = source[mix_sources(source, [1, 1], 0, 0)]
    assert 400 < np.count_nonzero(np.diff(drawn)) < 600  # as often as not the next row is of the other source


def test_a_weight_must_be_above_0_and_its_source_not_empty():
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"weight: expected numbers above 0, found 1, {weight}"):
            mix_sources(SOURCE, [1, weight], 0, 0)
    with pytest.raises(UserError, match="source 3 has no usable row"):
        mix_sources(SOURCE, [1, 1, 1], 0, 0)
    with pytest.raises(UserError, match="expected one for each of 2 sources, found 1"):
        mix_sources(SOURCE, [1], 0, 0)
