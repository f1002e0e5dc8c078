from collections import Counter

import pytest

from qlora_lightning.data.batches import epoch_plan
from qlora_lightning.data.batches.epoch_plan import EpochPlan, epochs_to_look_at, first_and_largest
from qlora_lightning.data.batches.order import epoch_order
from qlora_lightning.data.samples import SampleSetBuilder
from qlora_lightning.support.errors import UserError

LENGTHS = [(7 * n) % 23 + 1 for n in range(100)]  # from 1 to 23


def build(lengths=LENGTHS):
    """Row n of ``lengths[n]`` tokens; of 10 rows the first 7 are of source 0."""
    builder = SampleSetBuilder()
    for number, length in enumerate(lengths):
        builder.add([1] * length, [1] * length, number, int(number % 10 > 6), "train.jsonl", number + 1)
    return builder.build()


SAMPLES = build()


def plan(**kwargs):
    return EpochPlan(SAMPLES, **{"shuffle": True, "seed": 7} | kwargs)


def rows(batches):
    return [batch.rows for batch in batches]


def together(epoch=0, world_size=1, **kwargs):
    """The rows of each micro-batch over all ranks, fillers left out."""
    it = plan(world_size=world_size, **kwargs)
    ranks = [it.batches(epoch, rank) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(it)}
    return [[row for batch in step if not batch.filler for row in batch.rows] for step in zip(*ranks, strict=True)]


CUTS = [
    {"batch_size": 8},
    {"batch_size": 8, "group_by_length": True},
    {"tokens_per_batch": 64},
]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_without_weights_every_row_runs_once_an_epoch(cut, world_size, shuffle):
    for epoch in range(3):
        steps = together(epoch, world_size, shuffle=shuffle, **cut)
        assert sorted(row for step in steps for row in step) == list(range(100))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("weights", [None, [1, 3]])
def test_an_epoch_is_told_by_seed_and_number_and_without_shuffling_never_changes(cut, weights):
    first = rows(plan(weights=weights, **cut).batches(3))
    assert first == rows(plan(weights=weights, **cut).batches(3))
    assert (
        first != rows(plan(weights=weights, **cut).batches(4)) != rows(plan(weights=weights, seed=8, **cut).batches(4))
    )
    fixed = plan(weights=weights, shuffle=False, **cut)
    assert rows(fixed.batches(0)) == rows(fixed.batches(1))


def test_rows_follow_the_order_of_the_epoch():
    order = epoch_order(100, 7, 2)
    assert rows(plan(batch_size=8).batches(2)) == [order[at : at + 8] for at in range(0, 100, 8)]
    assert rows(plan(batch_size=60, shuffle=False).batches(2)) == [list(range(60)), list(range(60, 100))]


def test_bins_stay_within_the_budget_and_are_shuffled():
    bins = rows(plan(tokens_per_batch=64).batches(0))
    fills = [sum(LENGTHS[row] for row in bin_) for bin_ in bins]
    assert max(fills) <= 64
    assert len(bins) == -(-sum(LENGTHS) // 64)
    longest = [max(LENGTHS[row] for row in bin_) for bin_ in bins]
    assert longest != sorted(longest, reverse=True)
    unshuffled = rows(plan(tokens_per_batch=64, shuffle=False).batches(0))
    assert LENGTHS[unshuffled[0][0]] == 23  # memory runs out in the first batch or never


def test_ranks_take_the_bins_of_one_process_in_turn():
    alone = rows(plan(tokens_per_batch=64).batches(1))
    second = plan(tokens_per_batch=64, world_size=2).batches(1, rank=1)
    assert rows(second)[: len(alone) // 2] == alone[1::2]


def test_groups_are_of_like_length_over_all_ranks():
    for step in together(world_size=2, batch_size=4, group_by_length=True):
        lengths = [LENGTHS[row] for row in step]
        assert max(lengths) - min(lengths) <= 4


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_give_each_source_its_share_in_epochs_of_one_size(cut, world_size):
    steps = [together(epoch, world_size, weights=[1, 1], **cut) for epoch in range(6)]
    assert {len(epoch) for epoch in steps} == {len(plan(weights=[1, 1], world_size=world_size, **cut))}
    for epoch in steps:
        counts = Counter(SAMPLES.source[row] for step in epoch for row in step)
        if "batch_size" in cut:
            assert counts == {0: 50, 1: 50}
        else:  # the emptiest bins may be left out
            assert all(45 <= counts[source] <= 50 for source in (0, 1))


def test_bins_under_weights_are_as_many_as_in_epoch_0():
    lengths = [60] * 10 + [1] * 90  # an epoch takes a few of the long rows or many, and needs a bin for each
    it = EpochPlan(build(lengths), tokens_per_batch=64, shuffle=True, weights=[1, 30], seed=3)
    own = {len(it._pack(epoch)) for epoch in range(12)}
    assert min(own) < len(it) < max(own)  # so bins are cut in two in some epochs and left out in others
    assert {len(it.batches(epoch)) for epoch in range(12)} == {len(it)}


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match="batch_size and tokens_per_batch are both given"):
        plan(batch_size=8, tokens_per_batch=64)
    with pytest.raises(UserError, match="group_by_length: batches of tokens_per_batch are of like size already"):
        plan(tokens_per_batch=64, group_by_length=True)
    with pytest.raises(UserError, match="source 3 has no usable row"):
        plan(batch_size=8, weights=[1, 1, 1])


def test_a_sample_above_the_budget_is_named():
    with pytest.raises(UserError, match=r"longest sample, 23 tokens \(train.jsonl:14\), found 22, for which 4 of 100"):
        plan(tokens_per_batch=22)


FEW = (3, 1, 4, 1, 5, 9, 2, 7)


def make_plan(**settings):
    builder = SampleSetBuilder()
    for number, length in enumerate(FEW):
        builder.add([0] * length, [0] * length, number, 0, "rows.jsonl", number + 1)
    return EpochPlan(builder.build(), **settings)


def test_the_largest_batch_has_the_most_tokens():
    first, largest = first_and_largest(make_plan(batch_size=2), range(1))
    assert first.rows == [0, 1]
    assert largest.rows == [4, 5]


def test_the_longest_row_decides_between_equals():
    _, largest = first_and_largest(make_plan(batch_size=2), range(1), limit=2)
    assert largest.rows == [2, 3]  # five tokens are more than four
    plan = make_plan(batch_size=1)
    assert first_and_largest(plan, range(1), limit=4)[1].rows == [2]


def test_only_tokens_that_are_computed_count():
    computed = {(4, 5): 3, (6, 7): 7, (2, 3): 5, (0, 1): 4}
    _, largest = first_and_largest(make_plan(batch_size=2), range(1), count=lambda rows: computed[tuple(rows)])
    assert largest.rows == [6, 7]


def test_batches_that_are_done_or_beyond_the_limit_do_not_count():
    plan = make_plan(batch_size=2)
    first, largest = first_and_largest(plan, range(1), done=3)
    assert first.rows == largest.rows == [6, 7]
    assert first_and_largest(plan, range(1), limit=1)[1].rows == [0, 1]
    assert first_and_largest(plan, range(1), done=4) is None


def test_later_epochs_are_looked_at_where_their_batches_differ(monkeypatch):
    shuffled = make_plan(batch_size=2, shuffle=True)
    assert epochs_to_look_at(shuffled, 2, 5) == range(2, 5)
    assert epochs_to_look_at(shuffled, 2, 50) == range(2, 12)
    assert epochs_to_look_at(shuffled, 2, None) == range(2, 3)
    assert epochs_to_look_at(shuffled, 2, -1) == range(2, 3)
    assert epochs_to_look_at(make_plan(batch_size=2), 2, 5) == range(2, 3)
    assert epochs_to_look_at(make_plan(tokens_per_batch=9, shuffle=True), 0, 5) == range(1)
    monkeypatch.setattr(epoch_plan, "_ROWS", 2 * len(FEW))
    assert epochs_to_look_at(shuffled, 0, 5) == range(2)
    most = max(sum(FEW[row] for row in batch.rows) for epoch in range(5) for batch in shuffled.batches(epoch))
    _, found = first_and_largest(shuffled, range(5))
    assert sum(FEW[row] for row in found.rows) == most


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_has_its_own(rank):
    plan = make_plan(batch_size=1, world_size=2)
    rows = [batch.rows[0] for batch in plan.batches(0, rank)]
    longest = max(rows, key=lambda row: FEW[row])
    assert first_and_largest(plan, range(1), rank=rank)[1].rows == [longest]
