import pytest
import torch
from torch import nn

from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.guards.checks import check_frozen, checksum_frozen


def model(**tensors):
    made = nn.Module()
    for name, tensor in tensors.items():
        made.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return made


def test_only_frozen_parameters_are_summed_up():
    made = model(frozen=torch.ones(3))
    made.trains = nn.Parameter(torch.ones(3))
    made.register_buffer("buffer", torch.ones(3))
    assert checksum_frozen(made).keys() == {"frozen"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("place", [0, 7, 12])  # 13 elements: the last ones are no whole word
def test_one_changed_element_is_found(dtype, place):
    made = model(a=torch.arange(13).to(dtype), b=torch.ones(2))
    before = checksum_frozen(made)
    check_frozen(before, checksum_frozen(made))
    made.a[place] += 1
    with pytest.raises(RuntimeError, match="1 of 2 frozen tensors changed during training, as a:"):
        check_frozen(before, checksum_frozen(made))


def test_words_that_changed_places_are_found():
    made = model(a=torch.tensor([1, 2, 3]))
    before = checksum_frozen(made)
    made.a.copy_(torch.tensor([2, 1, 3]))
    assert checksum_frozen(made) != before


def test_of_a_large_tensor_evenly_spaced_runs_are_read():
    made = model(a=torch.zeros(16, 1 << 17, dtype=torch.uint8))  # 2 MiB: each run is the beginning of a row
    before = checksum_frozen(made)
    made.a[10, (1 << 14) + 1] = 1
    assert checksum_frozen(made) == before
    for row in (0, 10, 15):
        made.a.zero_()
        made.a[row, (1 << 14) - 1] = 1
        assert checksum_frozen(made) != before


def test_a_tensor_that_came_or_went_is_found():
    with pytest.raises(RuntimeError, match="1 of 1 frozen tensors changed"):
        check_frozen({"a": 1}, {})


@pytest.mark.parametrize(
    ("quantization", "double_quant", "scales"),
    [
        ("nf4", True, {"absmax", "nested_absmax"}),
        ("nf4", False, {"absmax"}),
        ("int8", False, {"SCB"}),
    ],
)
def test_the_scales_of_quantized_weights_count(tiny_base, quantization, double_quant, scales):
    base = load_base(str(tiny_base), quantization=quantization, double_quant=double_quant).model
    before = checksum_frozen(base)
    name = "model.layers.0.mlp.up_proj.weight"
    assert {key.removeprefix(f"{name}.") for key in before if key.startswith(f"{name}.")} == scales
    weight = base.get_parameter(name)
    scale = weight.SCB if quantization == "int8" else weight.quant_state.absmax
    scale[0] += 1
    with pytest.raises(RuntimeError, match=r"up_proj\.weight\.(absmax|SCB)"):
        check_frozen(before, checksum_frozen(base))


def test_the_first_forward_of_an_int8_base_changes_nothing(tiny_base):
    """It moves the scales from the weights to their modules."""
    base = load_base(str(tiny_base), quantization="int8", compute_dtype=torch.float32).model
    base.requires_grad_(False)
    before = checksum_frozen(base)
    base(input_ids=torch.tensor([[5, 6, 7]]))
    assert base.model.layers[0].mlp.up_proj.weight.SCB is None
    check_frozen(before, checksum_frozen(base))
