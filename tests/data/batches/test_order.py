import pytest
import torch

from qlora_lightning.data.batches.order import count_batches, epoch_order, permute, rank_batches, rank_bins


def test_the_order_is_a_permutation_told_by_seed_and_epoch():
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))
    assert epoch_order(50, 1, 2) == epoch_order(50, 1, 2)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_the_order_stays_the_one_in_which_saved_positions_count():
    assert epoch_order(8, 1, 2) == [1, 6, 7, 3, 2, 4, 5, 0]


def test_each_key_permutes_differently():
    assert permute(50, 1, 2).tolist() == epoch_order(50, 1, 2)
    keys = [(1, 2), (1, 2, "bins"), (1, 2, "groups"), (12,), (1, 12), (11, 2)]
    assert len({tuple(permute(50, *key)) for key in keys}) == len(keys)


def test_the_order_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    epoch_order(50, 1, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_share_each_micro_batch():
    order = list("abcdefghij")
    assert rank_batches(order, 2, 0, 2) == [(["a", "b"], False), (["e", "f"], False), (["i"], False)]
    assert rank_batches(order, 2, 1, 2) == [(["c", "d"], False), (["g", "h"], False), (["j"], False)]


def test_a_rank_without_rows_gets_a_filler():
    assert [rank_batches("abcde", 2, rank, 4)[0] for rank in range(4)] == [
        (["a", "b"], False),
        (["c"], False),
        (["d"], False),
        (["e"], False),
    ]
    assert rank_batches("abcde", 2, 1, 2)[1] == (["e"], True)


@pytest.mark.parametrize("n", [1, 5, 8, 13])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (2, 3), (4, 2), (8, 1)])
def test_every_row_runs_once_and_windows_do_not_depend_on_ranks(n, batch_size, world_size):
    ranks = [rank_batches(range(n), batch_size, rank, world_size) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {count_batches(n, batch_size, world_size)}
    together = [
        sorted(row for batch in step if not batch.filler for row in batch.rows) for step in zip(*ranks, strict=True)
    ]
    alone = [batch.rows for batch in rank_batches(range(n), batch_size * world_size, 0, 1)]
    assert together == alone


def test_ranks_take_bins_in_turn_and_run_a_filler_where_none_is_left():
    bins = [["a", "b"], ["c"], ["d", "e"], ["f"], ["g", "h"]]
    assert rank_bins(bins, 0, 2) == [(["a", "b"], False), (["d", "e"], False), (["g", "h"], False)]
    assert rank_bins(bins, 1, 2) == [(["c"], False), (["f"], False), (["g"], True)]
    assert rank_bins(bins, 0, 1) == [(rows, False) for rows in bins]
