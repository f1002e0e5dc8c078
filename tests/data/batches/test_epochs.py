"""Epochs: shuffled, mixed by weight, packed, cut into the ranks' batches, and resumed."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from qlora_lightning.data.batches import EpochPlan, PackedLoader, best_fit, collate_rows, mix_sources, permute
from tests.errors import rejects
from tests.packed import collate, gather

# ---- orders and bins -------------------------------------------------------------------------------------------------


def test_the_order_is_a_permutation_by_seed_and_epoch_and_draws_from_no_global_generator():
    before = torch.get_rng_state()
    assert permute(8, 1, 2).tolist() == [1, 6, 7, 3, 2, 4, 5, 0]  # in which saved positions count
    keys = [*itertools.product(range(4), range(4)), (1, 2, "bins"), (12,), (1, 12), (11, 2)]
    orders = {tuple(permute(50, *key)) for key in keys}
    assert len(orders) == len(keys)
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(50))}
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shares", [(1, 1), (1, 9)])
def test_within_a_source_every_row_is_seen_before_any_is_seen_again(shares):
    source = np.array([0] * 7 + [1] * 3, dtype=np.int32)
    epochs = [mix_sources(source, shares, seed=5, epoch=epoch).tolist() for epoch in range(30)]
    assert {len(epoch) for epoch in epochs} == {10}
    for rows in (range(7), range(7, 10)):
        seen = Counter()
        for epoch in epochs:
            seen.update(row for row in epoch if row in rows)
            times = [seen[row] for row in rows]
            assert max(times) - min(times) <= 1


def test_each_row_goes_where_it_leaves_the_least_room_in_the_order_of_the_epoch():
    # 6 opens a bin, 5 another, 4 fits beside 6 (room 4, none left), 3 beside 5 (room 5), and 2 beside both
    assert best_fit([2, 6, 3, 5, 4], range(5), 10) == [[1, 4], [3, 2, 0]]
    assert best_fit([5, 5, 5, 5], [2, 0, 3, 1], 10) == [[2, 0], [3, 1]]
    assert best_fit([4, 6], [0, 1, 0], 10) == [[1, 0], [0]]  # a row that is taken twice is packed twice
    # lengths as those of GSM8K's 7,473 training rows: from 97 to 570 tokens, 217 on average
    lengths = np.clip(np.random.default_rng(0).lognormal(5.33, 0.31, 7473), 97, 570).astype(int)
    first, second = (best_fit(lengths, permute(7473, 1, epoch), 2048) for epoch in range(2))
    assert lengths.sum() >= 0.98 * 2048 * len(first)
    same = {frozenset(rows) for rows in first} & {frozenset(rows) for rows in second}
    assert len(same) < 0.01 * len(first)


# ---- batches ---------------------------------------------------------------------------------------------------------

LENGTHS = [(7 * n) % 23 + 1 for n in range(100)]  # from 1 to 23


def build(lengths=LENGTHS):
    """Row n of ``lengths[n]`` tokens; of 10 rows the first 7 are of source 0."""
    rows = (([1] * length, [1] * length, n, int(n % 10 > 6), "train.jsonl", n + 1) for n, length in enumerate(lengths))
    return gather(*rows)


SAMPLES = build()


def plan(**kwargs):
    return EpochPlan(SAMPLES, **{"shuffle": True, "seed": 7} | kwargs)


def planned(batches):
    return [batch.rows for batch in batches]


def together(epoch=0, world_size=1, **kwargs):
    """The rows of each batch over all ranks, fillers left out."""
    it = plan(world_size=world_size, **kwargs)
    ranks = [it.batches(epoch, rank) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(it)}
    return [[row for batch in step if not batch.filler for row in batch.rows] for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("cut", [{"batch_size": 8}, {"tokens_per_batch": 64}])
def test_an_epoch_has_every_row_once_or_each_source_its_share_by_seed_and_number(cut):
    for world_size, epoch, shuffle in itertools.product((1, 3), range(3), (True, False)):
        steps = together(epoch, world_size, shuffle=shuffle, **cut)
        assert sorted(row for step in steps for row in step) == list(range(100))
        rows = [row for step in together(epoch, world_size, shares=[1, 1], **cut) for row in step]
        counts = Counter(SAMPLES.source[rows].tolist())
        # bins of the shortest rows may be left out
        assert counts == {0: 50, 1: 50} if "batch_size" in cut else min(counts[0], counts[1]) >= 45
    for shares in (None, [1, 3]):
        third = planned(plan(shares=shares, **cut).batches(3))
        assert third == planned(plan(shares=shares, **cut).batches(3))
        others = plan(shares=shares, **cut).batches(4), plan(shares=shares, seed=8, **cut).batches(3)
        assert third not in [planned(other) for other in others]
        fixed = plan(shares=shares, shuffle=False, **cut)
        assert planned(fixed.batches(0)) == planned(fixed.batches(1))


def test_a_window_does_not_depend_on_the_number_of_ranks():
    order = permute(100, 7, 2).tolist()
    assert planned(plan(batch_size=8).batches(2)) == [order[at : at + 8] for at in range(0, 100, 8)]
    assert together(2, 4, batch_size=2) == planned(plan(batch_size=8).batches(2))
    assert planned(plan(batch_size=60, shuffle=False).batches(2)) == [list(range(60)), list(range(60, 100))]
    alone, second = plan(tokens_per_batch=64).batches(1), plan(tokens_per_batch=64, world_size=2).batches(1, rank=1)
    assert planned(second)[: len(alone) // 2] == planned(alone)[1::2]
    five = EpochPlan(SAMPLES.take(range(5)), batch_size=2, world_size=4)  # a short window: each rank has a row
    assert [planned(five.batches(0, rank)) for rank in range(4)] == [[[0, 1]], [[2]], [[3]], [[4]]]


def test_bins_are_shuffled_and_under_shares_are_as_many_as_in_epoch_0():
    longest = [max(LENGTHS[row] for row in rows) for rows in planned(plan(tokens_per_batch=64).batches(0))]
    assert longest != sorted(longest, reverse=True)
    lengths = [60] * 10 + [1] * 90  # an epoch takes a few of the long rows or many, and needs a bin for each
    it = EpochPlan(build(lengths), tokens_per_batch=64, shuffle=True, shares=[1, 30], seed=3)
    assert {len(it.batches(epoch)) for epoch in range(12)} == {len(it)}


def test_a_sample_above_the_budget_and_a_source_without_rows_are_rejected():
    with rejects("data.tokens_per_batch", "23", "train.jsonl:14", "22"):
        plan(tokens_per_batch=22)
    with rejects("data.train", "source 3"):
        plan(batch_size=8, shares=[1, 1, 1])


# ---- positions -------------------------------------------------------------------------------------------------------

TWO_TOKENS = gather(*(([n, n + 1], [-100, n + 1], n) for n in range(11)))
PACKED = {"batch_size": None, "tokens_per_batch": 4}


def loader(samples=TWO_TOKENS, epoch=0, rank=0, **kwargs):
    it = PackedLoader(EpochPlan(samples, **{"batch_size": 2, "seed": 7, "shuffle": True} | kwargs), rank)
    it.sampler.set_epoch(epoch)
    return it


def rows(batches):
    return [batch["row_ids"].tolist() for batch in batches]


@pytest.mark.parametrize("cut", [{}, PACKED, {**PACKED, "shares": [1]}])
@pytest.mark.parametrize("position", [0, 1, 5])
def test_resuming_is_exact_also_a_second_time_in_the_same_epoch(position, cut, tmp_path):
    def saved_after(it, batches):
        walk = iter(it)
        for _ in range(batches):
            next(walk)
        torch.save(it.state_dict(), tmp_path / "state")
        return torch.load(tmp_path / "state", weights_only=True)

    def resumed(state):
        it = loader(**cut)
        iter(it)  # Lightning tries whether it is iterable
        it.load_state_dict(state)
        assert it.state_dict() == state
        it.sampler.set_epoch(3)
        return it

    expected = rows(loader(epoch=3, **cut))
    assert len(expected) == len(loader(**cut)) == 6
    state = saved_after(loader(epoch=3, **cut), position)
    assert rows(resumed(state)) == expected[position:]
    again = saved_after(resumed(state), 1)
    assert rows(resumed(again)) == (expected[position + 1 :] or expected)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"batch_size": 3}, "rows_per_batch = 2, but now rows_per_batch = 3"),
        ({}, {"shuffle": False}, "shuffle = True, but now shuffle = False"),
        ({}, {"shares": [1]}, "weights = None, but now weights = [1.0]"),
        ({}, {"samples": TWO_TOKENS.take(range(10))}, "rows = 11, but now rows = 10"),
        (PACKED, {**PACKED, "world_size": 2}, "bins_per_batch = 1, but now bins_per_batch = 2"),
        ({}, {"batch_size": 1, "world_size": 2}, None),  # the same rows per batch, over two processes
    ],
)
def test_a_position_in_other_batches_is_rejected_but_a_finished_epoch_is_not(before, now, message):
    it = loader(**before)
    walk = iter(it)
    next(walk)
    if message:
        with rejects("checkpoint.batches", message):
            loader(**now).load_state_dict(it.state_dict())
    list(walk)
    loader(**now).load_state_dict(it.state_dict())


# ---- packed batches --------------------------------------------------------------------------------------------------


def test_two_samples_end_to_end_and_a_filler_of_the_same_rows_unlabelled():
    samples = [([5, 6, 7], [-100, 6, 7], 4, 0), ([8, 9], [8, 9], 1, 2)]
    batch = collate(*samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]  # nothing is predicted across samples
    assert batch["cu_seqlens"].tolist() == [0, 3, 5]
    assert (batch["row_ids"].tolist(), batch["source"].tolist()) == ([4, 1], [0, 2])
    filler = collate_rows(gather(*samples), [0, 1], filler=True)
    assert (set(filler["labels"].flatten().tolist()), filler["row_ids"].tolist()) == ({-100}, [-1, -1])
    assert all(filler[key].tolist() == batch[key].tolist() for key in ("input_ids", "cu_seqlens", "source"))
    assert rows(loader(batch_size=1, rank=1, world_size=2))[-1] == [-1]
    assert rows(loader(**PACKED, rank=3, world_size=4))[-1] == [-1]  # 6 bins over 4 ranks: a row of a bin
