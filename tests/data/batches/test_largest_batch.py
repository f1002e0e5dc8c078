import pytest

from qlora_lightning.data.batches import epoch_plan
from qlora_lightning.data.batches.epoch_plan import EpochPlan, epochs_to_look_at, first_and_largest
from qlora_lightning.data.samples import SampleSetBuilder

LENGTHS = (3, 1, 4, 1, 5, 9, 2, 7)


def make_plan(**settings):
    builder = SampleSetBuilder()
    for number, length in enumerate(LENGTHS):
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
    monkeypatch.setattr(epoch_plan, "_ROWS", 2 * len(LENGTHS))
    assert epochs_to_look_at(shuffled, 0, 5) == range(2)
    most = max(sum(LENGTHS[row] for row in batch.rows) for epoch in range(5) for batch in shuffled.batches(epoch))
    _, found = first_and_largest(shuffled, range(5))
    assert sum(LENGTHS[row] for row in found.rows) == most


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_has_its_own(rank):
    plan = make_plan(batch_size=1, world_size=2)
    rows = [batch.rows[0] for batch in plan.batches(0, rank)]
    longest = max(rows, key=lambda row: LENGTHS[row])
    assert first_and_largest(plan, range(1), rank=rank)[1].rows == [longest]
