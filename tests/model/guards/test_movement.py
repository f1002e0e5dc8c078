import pytest
import torch
from torch import nn

from qlora_lightning.model.guards.guard import STEPS, AdapterMovement


def adapter():
    return {f"q.lora_{part}.default.weight": nn.Parameter(torch.full((2,), 0.5)) for part in "AB"}


def run(trainable, optimizer, steps, rates=None):
    """Take steps with gradients of one; gives whether each looked."""
    movement, looked = AdapterMovement(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rates[step] if rates else group["lr"]
        for parameter in trainable.values():
            parameter.grad = torch.ones_like(parameter)
        looked.append(movement.check(trainable, optimizer))
        optimizer.step()
    return looked


def sgd(parameters, lr=0.1):
    return torch.optim.SGD([{"params": list(parameters), "initial_lr": lr}], lr=lr)


def test_adapters_that_move_pass_and_are_looked_at_every_so_many_steps():
    trainable = adapter()
    looked = run(trainable, sgd(trainable.values()), 2 * STEPS + 1)
    assert [step for step, looks in enumerate(looked) if looks] == [0, STEPS, 2 * STEPS]


def test_a_tensor_that_no_group_holds_is_named():
    trainable = adapter()
    a, _ = trainable.values()
    with pytest.raises(RuntimeError, match=r"1 of 2 adapter tensors .* as q\.lora_B.*let `parameter_groups` return"):
        run(trainable, sgd([a]), STEPS + 1)


def test_a_learning_rate_too_small_for_float32_is_named():
    trainable = adapter()
    with pytest.raises(RuntimeError, match=r"2 of 2 adapter tensors .*model\.learning_rate is too small"):
        run(trainable, sgd(trainable.values(), lr=1e-12), STEPS + 1)


def test_a_step_of_one_last_bit_is_movement():
    trainable = adapter()
    run(trainable, sgd(trainable.values(), lr=6e-8), STEPS + 1)  # float sums of two would round that away


@pytest.mark.parametrize("rate", [0.0, 1e-12])
def test_steps_at_the_end_of_a_decay_or_the_start_of_a_warmup_do_not_count(rate):
    trainable = adapter()
    assert not any(run(trainable, sgd(trainable.values()), 3 * STEPS, rates=[rate] * 3 * STEPS))


def test_a_group_that_is_switched_off_may_stay():
    trainable = adapter()
    a, b = trainable.values()
    groups = [{"params": [a], "lr": 0.1, "initial_lr": 0.1}, {"params": [b], "lr": 0.0, "initial_lr": 0.0}]
    run(trainable, torch.optim.SGD(groups, lr=0.1), STEPS + 1)


def test_other_tensors_are_not_asked():
    trainable = {**adapter(), "embedding.weight": nn.Parameter(torch.ones(2))}
    run(trainable, sgd(list(trainable.values())[:2]), STEPS + 1)
