import pytest
import torch
import torch.nn.functional as F

from qlora_lightning.model.layers.decoder_layer import NormedLinears
from qlora_lightning.model.layers.lora import Frozen, FrozenWeight

WIDTH, OUTS, SCALINGS, EPS = 6, (4, 3, 5), (2.0, 0.5, 1.5), 1e-3


def draw(*shape):
    return torch.randn(*shape, generator=draw.generator, dtype=torch.float64)


@pytest.fixture
def parts():
    """Input, norm weight, frozen weights, biases of the first, and adapters of rank 2 and 3; the second has none."""
    draw.generator = torch.Generator().manual_seed(0)
    x, weight = draw(2, 7, WIDTH).requires_grad_(), draw(WIDTH)
    weights, biases = [draw(out, WIDTH) for out in OUTS], [draw(OUTS[0]), None, None]
    adapters = [draw(2, WIDTH), draw(OUTS[0], 2), None, None, draw(3, WIDTH), draw(OUTS[2], 3)]
    return x, weight, weights, biases, [each if each is None else each.requires_grad_() for each in adapters]


def written_out(x, weight, weights, biases, adapters):
    normed = F.rms_norm(x, (WIDTH,), weight, EPS)
    outputs = []
    for w, bias, a, b, scaling in zip(weights, biases, adapters[::2], adapters[1::2], SCALINGS, strict=True):
        output = F.linear(normed, w, bias)
        outputs.append(output if a is None else output + scaling * (normed @ a.t()) @ b.t())
    return outputs


def fused(x, weight, weights, biases, adapters):
    linears = tuple(
        Frozen(FrozenWeight(w), bias, scaling) for w, bias, scaling in zip(weights, biases, SCALINGS, strict=True)
    )
    return NormedLinears.apply(x, weight, EPS, linears, *adapters)


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(total, inputs)


def test_outputs_and_gradients_are_those_of_norm_and_linears_written_out(parts):
    ours, theirs = fused(*parts), written_out(*parts)
    inputs = [parts[0], *(each for each in parts[-1] if each is not None)]
    for one, other in zip([*ours, *gradients(ours, inputs)], [*theirs, *gradients(theirs, inputs)], strict=True):
        torch.testing.assert_close(one, other)


def test_an_input_without_gradient_gets_none(parts):
    x, *others = parts
    outputs = fused(x.detach(), *others)
    adapters = [each for each in others[-1] if each is not None]
    for one, other in zip(gradients(outputs, adapters), gradients(written_out(*parts), adapters), strict=True):
        torch.testing.assert_close(one, other)
