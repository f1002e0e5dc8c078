import math
import re

import pytest
import torch
from lightning import Callback
from torch import nn

from qlora_lightning.model.guards.checks import (
    check_callbacks,
    check_gradients,
    check_trainer,
    check_training_mode,
    find_dead_gradients,
    find_divergence,
)
from qlora_lightning.support.errors import UserError


def parameter(value, gradient):
    made = nn.Parameter(torch.full((2,), value))
    made.grad = None if gradient is None else torch.full((2,), gradient)
    return made


def adapter(a_gradient, b, b_gradient):
    return {
        "q_proj.lora_A.default.weight": parameter(1.0, a_gradient),
        "q_proj.lora_B.default.weight": parameter(b, b_gradient),
    }


@pytest.mark.parametrize(
    "alive",
    [
        adapter(a_gradient=0.0, b=0.0, b_gradient=1.0),  # A's gradient is zero while B is
        adapter(a_gradient=1.0, b=0.1, b_gradient=1.0),
        {"modules_to_save.default.weight": parameter(1.0, 0.0)},  # an embedding's rows may all be absent
    ],
)
def test_living_adapters_pass(alive):
    check_gradients(alive)


def test_checking_goes_on_until_every_b_has_moved():
    assert not check_gradients(adapter(a_gradient=0.0, b=0.0, b_gradient=1.0))
    assert check_gradients(adapter(a_gradient=1.0, b=0.1, b_gradient=1.0))


@pytest.mark.parametrize(
    ("dead", "name"),
    [
        (adapter(a_gradient=0.0, b=0.0, b_gradient=0.0), "1 of 2 .*lora_B"),
        (adapter(a_gradient=0.0, b=0.1, b_gradient=1.0), "1 of 2 .*lora_A"),
        (adapter(a_gradient=0.0, b=0.0, b_gradient=None), "1 of 2 .*lora_B"),
        (adapter(a_gradient=None, b=0.0, b_gradient=1.0), "1 of 2 .*lora_A"),
        (adapter(a_gradient=None, b=0.1, b_gradient=0.0), "2 of 2 "),
        ({"modules_to_save.default.weight": parameter(1.0, None)}, "1 of 1 .*modules_to_save"),
    ],
)
def test_adapters_without_gradient_are_named(dead, name):
    with pytest.raises(RuntimeError, match=name):
        check_gradients(dead)


def test_dead_and_waiting_tensors_are_told_apart():
    q = adapter(a_gradient=0.0, b=0.0, b_gradient=1.0)
    v = {name.replace("q_", "v_"): p for name, p in adapter(a_gradient=0.0, b=0.1, b_gradient=0.0).items()}
    dead, waiting = find_dead_gradients(q | v)
    assert dead == list(v)
    assert waiting == ["q_proj.lora_A.default.weight"]


@pytest.mark.parametrize(("value", "shown"), [(3e10, "3e\\+10"), (-5.0, "5"), (math.nan, "nan"), (math.inf, "inf")])
def test_adapters_that_have_grown_beyond_use_are_a_divergence(value, shown):
    trainable = adapter(a_gradient=0.0, b=value, b_gradient=0.0)
    found = find_divergence({**trainable, "k_proj.lora_B.default.weight": parameter(2.0, 0.0)}, 3, 0.5)
    words = rf"diverged by step 3, at learning rate 0\.5: .* up to {shown} \(q_proj\.lora_B\.default\.weight"
    assert re.search(words, str(found))


def test_adapters_of_a_usual_size_are_none():
    trainable = {**adapter(a_gradient=0.0, b=-0.1, b_gradient=0.0), "embedding.weight": parameter(9.0, 0.0)}
    assert find_divergence(trainable, 3, 0.5) is None
    assert find_divergence({}, 3, 0.5) is None


def test_evaluation_mode_is_refused_in_training():
    model = nn.Linear(1, 1)
    check_training_mode(model)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        check_training_mode(model.eval())


def test_a_missing_callback_is_refused():
    class Needed(Callback):
        """Stands for ExactResume."""

    check_callbacks([Callback(), Needed()], Needed)
    with pytest.raises(RuntimeError, match=r"Needed is missing.*super\(\).configure_callbacks"):
        check_callbacks([Callback()], Needed)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_precisions_that_keep_float32_masters_pass(precision):
    check_trainer(precision, "DDPStrategy", "nf4")


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_precisions_that_cast_the_masters_are_refused(precision):
    with pytest.raises(UserError, match=f"trainer.precision is {precision}"):
        check_trainer(precision, "SingleDeviceStrategy", "nf4")


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_strategies_that_shard_the_base_are_refused(strategy):
    with pytest.raises(UserError, match=f"trainer.strategy is {strategy}.*quantized as nf4.*ddp"):
        check_trainer("32-true", strategy, "nf4")
