"""What silently breaks training is refused: settings, callbacks, modes, token ids, gradients, a base that changes."""

import contextlib

import pytest
import torch
from torch import nn

from qlora_lightning import QLoRAModule
from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.guards.checks import (
    check_frozen,
    check_gradients,
    check_trainer,
    checksum_frozen,
)
from qlora_lightning.support.errors import UserError
from tests.flat import collate


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_precisions_that_train_pass_but_16_mixed_in_several_processes(precision):
    check_trainer(precision, "SingleDeviceStrategy", "nf4")
    with pytest.raises(UserError, match="2 processes") if precision == "16-mixed" else contextlib.nullcontext():
        check_trainer(precision, "DDPStrategy", "nf4", processes=2)


# ---- token ids -------------------------------------------------------------------------------------------------------


def batch_of(*rows):
    return collate(*((ids, [-100, *ids[1:]], number) for number, ids in enumerate(rows)))


def test_a_token_that_the_base_lacks_stops_the_run_and_its_row_is_named(tiny_base):
    """It is only at the end of the row, where no embedding is looked up."""
    module = QLoRAModule(base=str(tiny_base))
    module.configure_model()
    vocabulary = module.causal_lm.config.vocab_size
    module.compute_loss(batch_of([5, 6, vocabulary - 1]))
    for bad in (vocabulary, -1):
        with pytest.raises(UserError, match=f"A token of .*1.* has the id {bad:,}, .*tokens that the base lacks"):
            module.compute_loss(batch_of([0, 1, 2], [3, 4, bad], [5, 6]))


# ---- gradients -------------------------------------------------------------------------------------------------------


def parameter(value, gradient):
    made = nn.Parameter(torch.full((2,), value))
    made.grad = None if gradient is None else torch.full((2,), gradient)
    return made


def adapter(a_gradient, b, b_gradient, name="q_proj"):
    return {
        f"{name}.lora_A.default.weight": parameter(1.0, a_gradient),
        f"{name}.lora_B.default.weight": parameter(b, b_gradient),
    }


WAITS = adapter(a_gradient=0.0, b=0.0, b_gradient=1.0)  # A's gradient is zero while B is
ALIVE = adapter(a_gradient=1.0, b=0.1, b_gradient=1.0, name="v_proj")
EMBEDDING = {"modules_to_save.default.weight": parameter(1.0, 0.0)}  # all its rows may be absent


@pytest.mark.parametrize(("alive", "all_asked"), [(WAITS | ALIVE, False), (ALIVE | EMBEDDING, True)])
def test_living_adapters_pass_and_are_asked_again_until_every_b_has_moved(alive, all_asked):
    assert check_gradients(alive) is all_asked


@pytest.mark.parametrize(
    ("dead", "name"),
    [
        (adapter(a_gradient=0.0, b=0.0, b_gradient=0.0), "1 of 2 .*lora_B"),
        (adapter(a_gradient=0.0, b=0.1, b_gradient=1.0), "1 of 2 .*lora_A"),
        (adapter(a_gradient=0.0, b=0.1, b_gradient=0.0, name="k_proj") | WAITS | ALIVE, "2 of 6 .*k_proj.*k_proj"),
        ({"modules_to_save.default.weight": parameter(1.0, None)}, "1 of 1 .*modules_to_save"),
    ],
)
def test_adapters_without_gradient_are_named(dead, name):
    with pytest.raises(RuntimeError, match=name):
        check_gradients(dead)


# ---- the base --------------------------------------------------------------------------------------------------------


def test_one_changed_element_is_found_and_what_trains_may_change():
    model = nn.Linear(13, 3)
    model.bias.requires_grad_(False)
    before = checksum_frozen(model)
    model.weight.data += 1
    check_frozen(before, checksum_frozen(model))
    model.bias[2] += 1
    with pytest.raises(RuntimeError, match="1 of 1 frozen tensors changed during training, as bias:"):
        check_frozen(before, checksum_frozen(model))


@pytest.mark.parametrize(
    ("quantization", "double_quant", "scales"),
    [("nf4", True, {"absmax", "nested_absmax", "offset"}), ("nf4", False, {"absmax"}), ("int8", False, {"SCB"})],
)
def test_the_scales_of_quantized_weights_count_and_a_forward_changes_nothing(
    tiny_base, quantization, double_quant, scales
):
    options = {"quantization": quantization, "double_quant": double_quant, "compute_dtype": torch.float32}
    base = load_base(str(tiny_base), **options).model
    base.requires_grad_(False)
    before = checksum_frozen(base)
    name = "model.layers.0.mlp.up_proj.weight"
    assert {key.removeprefix(f"{name}.") for key in before if key.startswith(f"{name}.")} == scales
    base(input_ids=torch.tensor([[5, 6, 7]]))  # of int8 it moves the scales from the weights to their modules
    check_frozen(before, checksum_frozen(base))
    module = base.model.layers[0].mlp.up_proj
    scale = module.state.SCB if quantization == "int8" else module.weight.quant_state.absmax
    scale[0] += 1
    with pytest.raises(RuntimeError, match=r"up_proj\.weight\.(absmax|SCB)"):
        check_frozen(before, checksum_frozen(base))
