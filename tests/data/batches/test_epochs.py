"""Epochs cut into micro-batches, and resumed at every position of them."""

from collections import Counter

import pytest
import torch

from qlora_lightning.data.batches.collate import collate_rows
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.data.batches.loader import FlatLoader, PromptLoader
from qlora_lightning.data.batches.order import permute
from qlora_lightning.data.prepare import Prompt
from qlora_lightning.data.samples import SampleSetBuilder
from qlora_lightning.support.errors import UserError
from tests.flat import collate, gather

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


def planned(batches):
    return [batch.rows for batch in batches]


def together(epoch=0, world_size=1, **kwargs):
    """The rows of each micro-batch over all ranks, fillers left out."""
    it = plan(world_size=world_size, **kwargs)
    ranks = [it.batches(epoch, rank) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(it)}
    return [[row for batch in step if not batch.filler for row in batch.rows] for step in zip(*ranks, strict=True)]


CUTS = [{"batch_size": 8}, {"batch_size": 8, "group_by_length": True}, {"tokens_per_batch": 64}]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_without_weights_every_row_runs_once_an_epoch(cut, world_size, shuffle):
    for epoch in range(3):
        steps = together(epoch, world_size, shuffle=shuffle, **cut)
        assert sorted(row for step in steps for row in step) == list(range(100))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("weights", [None, [1, 3]])
def test_an_epoch_depends_on_seed_and_number_and_without_shuffling_never_changes(cut, weights):
    third = planned(plan(weights=weights, **cut).batches(3))
    assert third == planned(plan(weights=weights, **cut).batches(3))
    others = plan(weights=weights, **cut).batches(4), plan(weights=weights, seed=8, **cut).batches(3)
    assert third not in [planned(other) for other in others]
    fixed = plan(weights=weights, shuffle=False, **cut)
    assert planned(fixed.batches(0)) == planned(fixed.batches(1))


def test_rows_follow_the_order_of_the_epoch_and_the_longest_bin_of_an_unshuffled_one_comes_first():
    order = permute(100, 7, 2).tolist()
    assert planned(plan(batch_size=8).batches(2)) == [order[at : at + 8] for at in range(0, 100, 8)]
    assert planned(plan(batch_size=60, shuffle=False).batches(2)) == [list(range(60)), list(range(60, 100))]
    bins = planned(plan(tokens_per_batch=64).batches(0))
    longest = [max(LENGTHS[row] for row in rows) for rows in bins]
    assert longest != sorted(longest, reverse=True)
    unshuffled = planned(plan(tokens_per_batch=64, shuffle=False).batches(0))
    assert LENGTHS[unshuffled[0][0]] == 23  # memory runs out in the first batch or never


def test_ranks_take_the_bins_of_one_process_in_turn_and_groups_are_of_like_length_over_all_ranks():
    alone = planned(plan(tokens_per_batch=64).batches(1))
    second = plan(tokens_per_batch=64, world_size=2).batches(1, rank=1)
    assert planned(second)[: len(alone) // 2] == alone[1::2]
    for step in together(world_size=2, batch_size=4, group_by_length=True):
        assert max(LENGTHS[row] for row in step) - min(LENGTHS[row] for row in step) <= 4


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_give_each_source_its_share_in_epochs_of_one_size(cut, world_size):
    for epoch in range(6):
        counts = Counter(
            SAMPLES.source[row] for step in together(epoch, world_size, weights=[1, 1], **cut) for row in step
        )
        if "batch_size" in cut:
            assert counts == {0: 50, 1: 50}
        else:  # the emptiest bins may be left out
            assert all(45 <= counts[source] <= 50 for source in (0, 1))


def test_bins_under_weights_are_as_many_as_in_epoch_0():
    lengths = [60] * 10 + [1] * 90  # an epoch takes a few of the long rows or many, and needs a bin for each
    it = EpochPlan(build(lengths), tokens_per_batch=64, shuffle=True, weights=[1, 30], seed=3)
    assert {len(it.batches(epoch)) for epoch in range(12)} == {len(it)}


def test_a_sample_above_the_budget_and_a_source_without_rows_are_rejected():
    with pytest.raises(UserError, match=r"longest sample, 23 tokens \(train.jsonl:14\), found 22, for which 4 of 100"):
        plan(tokens_per_batch=22)
    with pytest.raises(UserError, match="source 3 has no usable row"):
        plan(batch_size=8, weights=[1, 1, 1])


# ---- positions -------------------------------------------------------------------------------------------------------

TWO_TOKENS = gather(*(([n, n + 1], [-100, n + 1], n) for n in range(11)))


def loader(samples=TWO_TOKENS, epoch=0, rank=0, **kwargs):
    it = FlatLoader(EpochPlan(samples, **{"batch_size": 2, "seed": 7, "shuffle": True} | kwargs), rank)
    it.sampler.set_epoch(epoch)
    return it


def rows(batches):
    return [batch["row_ids"].tolist() for batch in batches]


PACKED = {"batch_size": None, "tokens_per_batch": 4}


@pytest.mark.parametrize("cut", [{}, {"group_by_length": True}, PACKED, {**PACKED, "weights": [1]}])
@pytest.mark.parametrize("position", range(6))
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


def test_a_position_belongs_to_its_epoch_and_a_new_iteration_begins_at_the_start():
    it = loader()
    next(iter(it))
    state = it.state_dict()
    assert state["position"] == 1
    assert len(rows(it)) == len(rows(it)) == 6
    it.sampler.set_epoch(1)
    assert it.state_dict()["position"] == 0
    other = loader()
    other.load_state_dict(state)
    other.sampler.set_epoch(1)
    assert rows(other) == rows(loader(epoch=1))


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"batch_size": 3}, "rows_per_batch = 2, but now rows_per_batch = 3"),
        ({}, {"group_by_length": True}, "group_by_length = False, but now group_by_length = True"),
        ({}, {"shuffle": False}, "shuffle = True, but now shuffle = False"),
        ({}, {"weights": [1]}, r"weights = None, but now weights = \[1.0\]"),
        ({}, PACKED, "rows_per_batch = 2, but now rows_per_batch = 0"),
        ({}, {"samples": TWO_TOKENS[:-1]}, "rows = 11, but now rows = 10"),
        (PACKED, {**PACKED, "tokens_per_batch": 6}, "tokens_per_batch = 4, but now tokens_per_batch = 6"),
        (PACKED, {**PACKED, "world_size": 2}, "bins_per_batch = 1, but now bins_per_batch = 2"),
        ({}, {"batch_size": 1, "world_size": 2}, None),  # the same rows per batch, over two processes
    ],
)
def test_a_position_in_other_batches_is_rejected_but_a_finished_epoch_is_not(before, now, message):
    it = loader(**before)
    walk = iter(it)
    next(walk)
    if message:
        with pytest.raises(UserError, match=message):
            loader(**now).load_state_dict(it.state_dict())
    else:
        loader(**now).load_state_dict(it.state_dict())
    list(walk)
    loader(**now).load_state_dict(it.state_dict())


# ---- flat batches ----------------------------------------------------------------------------------------------------

TWO = [([5, 6, 7], [-100, 6, 7], 4, 0), ([8, 9], [8, 9], 1, 2)]


def test_two_samples_end_to_end():
    batch = collate(*TWO)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]  # nothing is predicted across samples
    assert (batch["cu_seqlens"].tolist(), batch["longest"]) == ([0, 3, 5], 3)
    assert (batch["row_ids"].tolist(), batch["source"].tolist()) == ([4, 1], [0, 2])
    kinds = {key: value.dtype for key, value in batch.items() if key != "longest"}
    assert kinds.pop("cu_seqlens") == torch.int32
    assert (kinds.pop("weights"), batch["weights"].tolist()) == (torch.float32, [1.0, 1.0])
    assert set(kinds.values()) == {torch.int64}
    assert collate((*TWO[0], 0.5), (*TWO[1], 1.0))["weights"].tolist() == [0.5, 1.0]


def test_a_rank_without_rows_runs_the_same_rows_unlabelled():
    samples = gather(*((*row, 0.5) for row in TWO))
    filler, batch = collate_rows(samples, [1, 0], filler=True), collate_rows(samples, [1, 0])
    assert set(filler["labels"].flatten().tolist()) == {-100}
    assert (filler["row_ids"].tolist(), filler["weights"].tolist()) == ([-1, -1], [1.0, 1.0])
    assert all(filler[key].tolist() == batch[key].tolist() for key in ("input_ids", "cu_seqlens", "source"))
    assert rows(loader(batch_size=1, rank=1, world_size=2))[-1] == [-1]
    assert rows(loader(**PACKED, rank=3, world_size=4))[-1] == [-1]  # 6 bins over 4 ranks


def test_batches_of_prompts_hold_what_generation_and_its_report_need():
    prompts = [Prompt([number], str(number), number, {"n": number}) for number in range(3)]
    first, second = PromptLoader(prompts, 2, [2])
    assert first["prompt_ids"] == [[0], [1]]
    values = {"prompt_ids": [[2]], "stop_ids": [2], "references": ["2"], "row_ids": [2], "rows": [{"n": 2}]}
    assert second == values
    batches = list(PromptLoader(prompts, 1, [2], rank=1, world_size=2))
    assert [batch["row_ids"] for batch in batches] == [[1], []]
