import torch

from qlora_lightning.model.checkpoint.ranks import describe_other_number, gather_states, share_states


def state(seed, gradient, tokens):
    window = {
        "micro_batches": 2,
        "nll_sum": torch.tensor(float(tokens)),
        "labelled_tokens": torch.tensor(tokens),
        "row_ids": [seed],
        "gradients": {"a": torch.tensor([gradient, 1.0])},
    }
    return {"generators": {"seed": seed}, "window": window}


SAVED = [state(7, 2.0, 10), state(8, 3.0, 5)]


def test_one_process_has_its_own_state_alone():
    mine = state(7, 2.0, 10)
    assert gather_states(mine, 0, 1) == [mine]


def test_as_many_processes_get_back_each_its_own():
    assert share_states(SAVED, 0, 2) is SAVED[0]
    assert share_states(SAVED, 1, 2) is SAVED[1]


def test_fewer_processes_take_over_the_sums_of_all():
    mine = share_states(SAVED, 0, 1)
    assert mine["generators"] == {"seed": 7}
    assert mine["window"]["micro_batches"] == 2
    assert mine["window"]["row_ids"] == [7, 8]
    assert (mine["window"]["nll_sum"], mine["window"]["labelled_tokens"]) == (15, 15)
    assert mine["window"]["gradients"]["a"].tolist() == [5.0, 2.0]


def test_of_more_processes_the_first_has_the_sums_and_the_others_nothing_but_an_open_window():
    first, second, third = (share_states(SAVED, rank, 3) for rank in range(3))
    assert first["window"]["gradients"]["a"].tolist() == [5.0, 2.0]
    assert second["generators"] == {"seed": 8}
    assert third["generators"] == {}
    for other in (second, third):
        assert other["window"]["micro_batches"] == 2
        assert other["window"]["row_ids"] == []
        assert (other["window"]["nll_sum"], other["window"]["labelled_tokens"]) == (0, 0)
        assert other["window"]["gradients"]["a"].tolist() == [0.0, 0.0]


def test_between_windows_there_is_nothing_to_share():
    closed = [{"generators": {}, "window": {}}] * 2
    assert share_states(closed, 0, 1)["window"] == share_states(closed, 2, 3)["window"] == {}


def test_another_number_is_told_in_a_sentence():
    assert "saved by 2 processes, and 1 goes on" in describe_other_number(2, 1)
    assert "saved by 1 process, and 4 go on" in describe_other_number(1, 4)
