import pytest
import torch
from torch import nn

from qlora_lightning.model.loss import LossSums
from qlora_lightning.model.window import Window


def sums(nll, tokens):
    return LossSums(torch.tensor(nll), torch.tensor(tokens), torch.tensor(0))


def parameter_with_gradient(value):
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), value)
    return parameter


def add_two(window):
    window.add(sums(6.0, 1), most=2, row_ids=[3, 1])
    window.add(sums(4.0, 4), most=2, row_ids=[7])


def test_gradients_of_sums_become_those_of_the_mean_over_all_tokens():
    window, parameter, unused = Window(), parameter_with_gradient(10.0), nn.Parameter(torch.zeros(2))
    add_two(window)
    loss = window.divide_gradients([parameter, unused], divided_by=2)
    assert loss == 2.0  # (6 + 4) / (1 + 4)
    assert parameter.grad.tolist() == [4.0, 4.0]  # 10 × 2 / 5: what Lightning has divided by is multiplied back
    assert unused.grad is None


def test_tokens_of_all_ranks_count():
    window, parameter = Window(), parameter_with_gradient(10.0)
    window.add(sums(6.0, 1), most=1)
    other_rank = iter([torch.tensor([4.0, 4.0]), torch.tensor([10.0, 10.0])])  # its sums, and its gradients
    loss = window.divide_gradients([parameter], divided_by=1, reduce_sum=lambda tensor: tensor + next(other_rank))
    assert loss == 2.0
    assert parameter.grad.tolist() == [4.0, 4.0]


def test_a_window_without_labels_gives_gradients_of_zero_not_nan():
    window, parameter = Window(), parameter_with_gradient(0.0)
    window.add(sums(0.0, 0), most=1)
    assert window.divide_gradients([parameter], 1) == 0.0
    assert parameter.grad.tolist() == [0.0, 0.0]


def test_more_micro_batches_than_a_window_has_means_it_was_never_closed():
    window = Window()
    add_two(window)
    with pytest.raises(RuntimeError, match=r"without calling `super\(\).on_before_optimizer_step\(optimizer\)`"):
        window.add(sums(1.0, 1), most=2)


def test_a_step_without_a_micro_batch_is_refused():
    with pytest.raises(RuntimeError, match="call compute_loss in training_step"):
        Window().divide_gradients([], 1)


def test_it_is_open_from_the_first_micro_batch_until_cleared():
    window = Window()
    assert not window.is_open
    add_two(window)
    assert window.is_open
    assert window.row_ids == [3, 1, 7]
    window.clear()
    assert not window.is_open
    assert window.row_ids == []


def test_losses_are_kept_without_their_graph():
    window = Window()
    window.add(LossSums(torch.tensor(1.0, requires_grad=True) * 2, torch.tensor(1), torch.tensor(0)), most=1)
    assert not window.nll_sum.requires_grad


def test_it_keeps_its_micro_batches_until_cleared():
    window = Window()
    window.add(sums(6.0, 1), most=2, batch={"input_ids": 1})
    window.add(sums(4.0, 4), most=2, batch={"input_ids": 2})
    assert window.batches == [{"input_ids": 1}, {"input_ids": 2}]
    assert window.losses == [6.0, 4.0]
    window.divide_gradients([], 1)
    assert window.labelled_tokens_of_all_ranks == 5
    window.clear()
    assert window.batches == window.losses == []


def test_an_open_window_goes_on_from_its_saved_state(tmp_path):
    window, parameter = Window(), parameter_with_gradient(10.0)
    add_two(window)
    torch.save(window.state_dict({"a": parameter, "without": nn.Parameter(torch.zeros(1))}), tmp_path / "window")
    parameter.grad.zero_()  # the saved gradient is a copy

    again, other = Window(), nn.Parameter(torch.zeros(2))
    again.load_state_dict(torch.load(tmp_path / "window", weights_only=True), {"a": other})
    assert other.grad.tolist() == [10.0, 10.0]
    assert (again.micro_batches, again.row_ids) == (2, [3, 1, 7])
    assert again.divide_gradients([other], 2) == 2.0


def test_a_closed_window_has_no_state_and_loading_it_closes():
    assert Window().state_dict({"a": parameter_with_gradient(1.0)}) == {}
    window = Window()
    add_two(window)
    window.load_state_dict({}, {})
    assert not window.is_open


def test_the_rows_of_a_closed_window_are_kept_until_the_next_is_closed():
    window = Window()
    window.add(sums(1.0, 1), most=2, row_ids=[3, 1])
    window.clear()
    assert (window.row_ids, window.closed_row_ids) == ([], [3, 1])
    window.add(sums(1.0, 1), most=2, row_ids=[5])
    assert (window.row_ids, window.closed_row_ids) == ([5], [3, 1])
