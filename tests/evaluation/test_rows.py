import torch

from qlora_lightning.evaluation.rows import choose_max_new_tokens, cut_rows, last_turn, split_sample
from tests.flat import collate

NO = -100


def test_the_last_run_of_labels_is_the_answer_and_all_before_it_the_prompt():
    assert split_sample([1, 2, 3, 4], [NO, NO, 3, 4]) == ([1, 2], [3, 4])
    turns = [1, 2, 9, 3, 4, 9, 5], [NO, 2, 9, NO, 4, 9, NO]
    assert split_sample(*turns) == ([1, 2, 9, 3], [4, 9])


def test_where_everything_is_labelled_there_is_no_prompt():
    assert split_sample([1, 2, 3], [NO, 2, 3]) == (None, [2, 3])


def test_a_batch_is_cut_into_its_rows_without_fillers():
    samples = [([1, 2, 3], [NO, NO, 3], 4, 1), ([5, 6], [NO, NO], -1)]
    samples.append(([7, 8, 9], [NO, NO, 9], 2))
    first, second = cut_rows(collate(*samples))
    assert (first.number, first.source, first.prompt, first.expected) == (4, 1, [1, 2], [3])
    assert (second.number, second.source, second.prompt, second.expected) == (2, 0, [7, 8], [9])
    assert torch.equal(second.batch["position_ids"], torch.tensor([[0, 1, 2]]))


def test_the_last_turn_lies_between_the_last_two_stop_tokens():
    assert last_turn([8, 1, 0, 5, 6, 0, 7], [0]) == [5, 6]
    assert last_turn([5, 6, 0, 7], [0]) == [5, 6]
    assert last_turn([5, 6], [0]) == [5, 6]


def test_the_limit_is_twice_the_longest_answer_within_bounds():
    rows = cut_rows(collate((list(range(60)), [NO] * 20 + list(range(20, 60)), 0)))
    assert choose_max_new_tokens(rows) == 80
    assert choose_max_new_tokens([]) == 32
    assert choose_max_new_tokens(cut_rows(collate(([1, 2, 3], [NO, NO, 3], 0)))) == 32
    long = cut_rows(collate(([0] * 900, [NO] * 2 + [1] * 898, 0)))
    assert choose_max_new_tokens(long) == 512


def test_a_batch_of_another_make_is_judged_as_a_whole():
    (row,) = cut_rows({"x": 1})
    assert (row.batch, row.prompt, row.expected) == ({"x": 1}, None, [])
