import numpy as np
import pytest
import torch
from torch.utils.data import SequentialSampler

from qlora_lightning.data.batches.collate import collate, collate_rows
from qlora_lightning.data.batches.loader import FlatLoader
from qlora_lightning.data.batches.order import epoch_order
from qlora_lightning.data.prompts import Prompt, PromptLoader
from qlora_lightning.data.samples import Sample, gather_samples, make_sample
from qlora_lightning.support.errors import UserError

SAMPLES = [make_sample([number, number + 1], [-100, number + 1], number) for number in range(11)]


def loader(**kwargs):
    return FlatLoader(SAMPLES, **{"batch_size": 2, "seed": 7, "shuffle": True} | kwargs)


def rows(batches):
    return [batch["row_ids"].tolist() for batch in batches]


def test_an_epoch_follows_its_order():
    it = loader()
    for epoch in (0, 1, 0):
        it.sampler.set_epoch(epoch)
        order = epoch_order(11, 7, epoch)
        assert rows(it) == [order[at : at + 2] for at in range(0, 11, 2)]
    assert len(it) == 6


def test_without_shuffling_the_file_order():
    assert rows(loader(shuffle=False, batch_size=8)) == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10]]


def test_a_new_iteration_begins_at_the_start_whatever_became_of_the_last():
    it = loader()
    next(iter(it))
    iter(it)
    assert len(rows(it)) == len(rows(it)) == 6


@pytest.mark.parametrize("position", range(6))
def test_going_on_is_exact_also_a_second_time_in_the_same_epoch(position):
    def saved_after(it, batches):
        walk = iter(it)
        for _ in range(batches):
            next(walk)
        return it.state_dict()

    def resumed(state):
        it = loader()
        iter(it)  # Lightning tries whether it is iterable
        it.load_state_dict(state)
        assert it.state_dict() == state
        it.sampler.set_epoch(3)
        return it

    whole = loader()
    whole.sampler.set_epoch(3)
    expected = rows(whole)
    first = loader()
    first.sampler.set_epoch(3)
    state = saved_after(first, position)
    assert rows(resumed(state)) == expected[position:]
    again = saved_after(resumed(state), 1)
    assert rows(resumed(again)) == (expected[position + 1 :] or expected)


def test_a_position_belongs_to_its_epoch():
    it = loader()
    next(iter(it))
    state = it.state_dict()
    it.sampler.set_epoch(1)
    assert it.state_dict()["position"] == 0
    other = loader()
    other.load_state_dict(state)
    other.sampler.set_epoch(1)
    assert len(rows(other)) == 6


def test_a_position_in_other_data_is_refused_but_a_finished_epoch_is_not():
    it = loader()
    walk = iter(it)
    next(walk)
    state = it.state_dict()
    for changed, message in (
        (loader(batch_size=3), "rows_per_batch = 2, but now rows_per_batch = 3"),
        (loader(group_by_length=True), "group_by_length = False, but now group_by_length = True"),
        (loader(weights=[1]), r"weights = None, but now weights = \[1.0\]"),
        (loader(batch_size=None, tokens_per_batch=4), "rows_per_batch = 2, but now rows_per_batch = 0"),
        (FlatLoader(SAMPLES[:-1], 2), "rows = 11, but now rows = 10"),
        (FlatLoader([*SAMPLES[:-1], make_sample([1], [1], 0)], 2), "tokens = 22, but now tokens = 21"),
    ):
        with pytest.raises(UserError, match=message):
            changed.load_state_dict(state)
    loader(batch_size=1, world_size=2).load_state_dict(state)  # the same rows per batch, over two processes
    list(walk)
    loader(batch_size=3).load_state_dict(it.state_dict())


def test_a_position_among_bins_is_of_one_budget_and_number_of_processes():
    it = loader(batch_size=None, tokens_per_batch=4)
    next(iter(it))
    state = it.state_dict()
    for changed, message in (
        ({"tokens_per_batch": 6}, "tokens_per_batch = 4, but now tokens_per_batch = 6"),
        ({"tokens_per_batch": 4, "world_size": 2}, "bins_per_batch = 1, but now bins_per_batch = 2"),
        ({"batch_size": 2}, "rows_per_batch = 0, but now rows_per_batch = 2"),
    ):
        with pytest.raises(UserError, match=message):
            loader(**{"batch_size": None} | changed).load_state_dict(state)


@pytest.mark.parametrize(
    "cut",
    [
        {"batch_size": 2, "group_by_length": True},
        {"batch_size": None, "tokens_per_batch": 4},
        {"batch_size": None, "tokens_per_batch": 4, "weights": [1]},
    ],
)
def test_going_on_is_exact_however_batches_are_cut(cut):
    whole = loader(**cut)
    whole.sampler.set_epoch(3)
    expected = rows(whole)
    assert len(expected) == len(whole) == 6
    walk = iter(whole)
    next(walk), next(walk)
    it = loader(**cut)
    it.load_state_dict(whole.state_dict())
    assert rows(it) == expected[2:]


def test_a_state_is_made_of_plain_values(tmp_path):
    state = loader(batch_size=None, tokens_per_batch=4, weights=np.array([2.0])).state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


def test_lightning_sees_whether_rows_are_shuffled():
    assert not isinstance(loader().sampler, SequentialSampler)
    assert isinstance(loader(shuffle=False).sampler, SequentialSampler)
    assert list(loader().sampler) == epoch_order(11, 7, 0)
    assert list(loader(shuffle=False).sampler) == list(range(11))


def test_a_rank_without_rows_runs_one_unlabelled_row():
    batch = list(loader(batch_size=1, rank=1, world_size=2))[-1]
    assert batch["row_ids"].tolist() == [-1]
    assert set(batch["labels"].flatten().tolist()) == {-100}
    packed = list(loader(batch_size=None, tokens_per_batch=4, rank=3, world_size=4))[-1]  # 6 bins over 4 ranks
    assert packed["row_ids"].tolist() == [-1]


TWO = [
    Sample(torch.tensor([5, 6, 7]), torch.tensor([-100, 6, 7]), 4, 0),
    Sample(torch.tensor([8, 9]), torch.tensor([8, 9]), 1, 2),
]


def test_two_samples_end_to_end():
    batch = collate(TWO)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]  # nothing is predicted across samples
    assert batch["cu_seqlens"].tolist() == [0, 3, 5]
    assert batch["longest"] == 3
    assert batch["row_ids"].tolist() == [4, 1]
    assert batch["source"].tolist() == [0, 2]
    kinds = {key: value.dtype for key, value in batch.items() if key != "longest"}
    assert kinds.pop("cu_seqlens") == torch.int32
    assert set(kinds.values()) == {torch.int64}


@pytest.mark.parametrize("rows", [[0], [1, 0], [1, 1, 0]])
def test_a_filler_is_the_same_rows_without_labels_and_numbers(rows):
    samples = gather_samples(TWO)
    filler, batch = collate_rows(samples, rows, filler=True), collate_rows(samples, rows)
    assert set(filler["labels"].flatten().tolist()) == {-100}
    assert filler["row_ids"].tolist() == [-1] * len(rows)
    for key in ("input_ids", "position_ids", "cu_seqlens", "source"):
        assert filler[key].tolist() == batch[key].tolist()


def test_weights_are_in_a_batch_if_a_row_has_one():
    weighted = [sample._replace(weight=weight) for sample, weight in zip(TWO, (0.5, 1.0), strict=True)]
    assert collate(weighted)["weights"].tolist() == [0.5, 1.0]
    assert collate_rows(gather_samples(weighted), [1])["weights"].tolist() == [1.0]
    assert "weights" not in collate(TWO)


PROMPTS = [Prompt([number], str(number), number, {"n": number}) for number in range(3)]


def test_batches_hold_what_generation_and_its_report_need():
    assert list(PromptLoader(PROMPTS, 2, [2])) == [
        {
            "prompt_ids": [[0], [1]],
            "stop_ids": [2],
            "references": ["0", "1"],
            "row_ids": [0, 1],
            "rows": [{"n": 0}, {"n": 1}],
        },
        {"prompt_ids": [[2]], "stop_ids": [2], "references": ["2"], "row_ids": [2], "rows": [{"n": 2}]},
    ]


def test_a_rank_without_rows_has_an_empty_batch():
    batches = list(PromptLoader(PROMPTS, 1, [2], rank=1, world_size=2))
    assert [batch["row_ids"] for batch in batches] == [[1], []]
    assert len(PromptLoader(PROMPTS, 1, [2], rank=1, world_size=2)) == 2
