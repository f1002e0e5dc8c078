"""Element-wise regions as a GPU runs them, compiled; here by the compiler's way for a CPU."""

import pytest
import torch

from qlora_lightning.model.layers import elementwise

WIDTH, WIDE = 64, 96


def rows_of(count, width, seed, dtype=torch.bfloat16):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(count):
    x, weight, grad = rows_of(count, WIDTH, 0), rows_of(1, WIDTH, 1)[0], rows_of(count, WIDTH, 2)
    inverse = elementwise.rms_norm.__wrapped__(x, weight, 1e-5)[1]
    return [
        (elementwise.rms_norm.__wrapped__, (x, weight, 1e-5)),
        (elementwise.rms_norm_again.__wrapped__, (x, weight, inverse)),
        (elementwise.rms_norm_backward.__wrapped__, (grad, x, weight, inverse)),
    ]


def rotary(count):
    query, key = (rows_of(count, 4 * 16, seed).view(1, count, 4, 16).transpose(1, 2) for seed in (0, 1))
    angles = rows_of(count, 8, 2, torch.float32).repeat(1, 2)[None]
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    return [(elementwise._rotate, (query, key[:, :2], cos, sin, back)) for back in (False, True)]


def swiglu(count):
    gate, up, grad = (rows_of(count, WIDE, seed) for seed in range(3))
    calls = [(elementwise.swiglu.__wrapped__, (gate, up))]
    for needed in ((True, True, True), (False, True, False)):
        calls.append((elementwise.swiglu_backward.__wrapped__, (gate, up, grad, *needed)))
    return calls


def run(function, arguments):
    copies = [each.clone() if isinstance(each, torch.Tensor) else each for each in arguments]
    found = function(*copies)
    return [each for each in (found if isinstance(found, tuple) else (found,)) if each is not None]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of what its own compiler does
@pytest.mark.parametrize("calls", [norm, rotary, swiglu])
def test_compiled_they_give_the_same_numbers_and_are_compiled_once_for_all_lengths(calls):
    torch._dynamo.reset()
    for count in (100, 137, 33):
        if count == 33:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for function, arguments in calls(count):
            for one, other in zip(
                run(elementwise._compile(function), arguments), run(function, arguments), strict=True
            ):
                assert one.dtype == other.dtype
                assert (one - other).float().norm() <= 4e-3 * other.float().norm()  # a rounding of bfloat16
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
