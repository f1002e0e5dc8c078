import pytest
import torch
import torch.nn.functional as F

from qlora_lightning.model.layers.elementwise import swiglu
from qlora_lightning.model.layers.lora import Casts, Frozen, FrozenWeight, LoRAProjection

WIDTH, WIDE, SCALING = 4, 6, 2.0


@pytest.mark.parametrize("adapted", [True, False])
def test_output_and_gradients_are_those_of_swiglu_and_linear_written_out(adapted):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    gate, up, residual = draw(2, 5, WIDE), draw(2, 5, WIDE), draw(2, 5, WIDTH)
    weight, bias, a, b = draw(WIDTH, WIDE).detach(), draw(WIDTH).detach(), draw(3, WIDE), draw(WIDTH, 3)
    hidden = F.silu(gate) * up
    expected = residual + F.linear(hidden, weight, bias) + (SCALING * (hidden @ a.t()) @ b.t() if adapted else 0)
    hidden, low = swiglu(gate, up, a if adapted else None, Casts())
    frozen = Frozen(FrozenWeight(weight), bias, SCALING)
    output = LoRAProjection.apply(hidden, low, b if adapted else None, frozen, residual)
    inputs, weights = [gate, up, residual, *((a, b) if adapted else ())], draw(2, 5, WIDTH).detach()
    ours, theirs = (torch.autograd.grad((each * weights).sum(), inputs) for each in (output, expected))
    for one, other in zip([output, *ours], [expected, *theirs], strict=True):
        torch.testing.assert_close(one, other)
