import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_lightning.commands.profile.kept import KeptTensors
from qlora_lightning.commands.profile.parts import (
    ACTIVATION,
    ADAPTERS,
    BASE,
    NORMS,
    RECOMPUTATION,
    ROTARY,
    Widths,
)
from qlora_lightning.commands.profile.scopes import Scopes
from qlora_lightning.model.layers.elementwise import Rotary

WIDTHS = Widths(narrow=frozenset({2}), hidden=4, vocabulary=100)


class MatMul4Bit(torch.autograd.Function):
    """Keeps a tensor as bitsandbytes does, where no hook sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.tensors = (None, torch.ones(7))
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def kept(forward, *parameters):
    scopes = Scopes()
    watched = KeptTensors(nn.ParameterList(parameters), scopes, WIDTHS)
    watched.start()
    loss = forward(scopes)
    watched.stop()
    sizes = watched.bytes_by_part(loss)
    loss.backward()
    return sizes


def leaf(*shape):
    return torch.ones(shape, requires_grad=True)


def test_a_storage_counts_once_and_parameters_do_not():
    weight = nn.Parameter(torch.ones(4, 4))
    x = leaf(10, 4)

    def forward(scopes):
        with scopes.enter(BASE):
            y = x @ weight  # keeps x and the weight
        with scopes.enter(ACTIVATION):
            return (F.silu(y) + F.silu(y[:5].sum())).sum()  # keeps y once, and the sum of a part of it

    assert kept(forward, weight) == {BASE: 10 * 4 * 4, ACTIVATION: 10 * 4 * 4 + 4}


def test_a_function_says_its_part_and_narrow_matrices_are_the_adapters():
    x, low = leaf(1, 1, 10, 4), leaf(10, 2)
    cos, sin = torch.ones(1, 10, 4), torch.zeros(1, 10, 4)

    def forward(scopes):
        with scopes.enter(NORMS):
            return Rotary.apply(x, x, cos, sin)[0].sum() + low.square().sum()

    assert kept(forward) == {ROTARY: 2 * 10 * 4 * 4, ADAPTERS: 10 * 2 * 4}


def test_of_a_checkpointed_layer_its_inputs_count():
    x = leaf(10, 4)

    def forward(scopes):
        inside = checkpoint(lambda x: F.silu(F.silu(x)), x * 1, use_reentrant=False)
        with scopes.enter(NORMS):
            return inside.square().sum()

    assert kept(forward) == {RECOMPUTATION: 10 * 4 * 4, NORMS: 10 * 4 * 4}


def test_what_a_function_keeps_on_itself_counts():
    x = leaf(3)
    assert kept(lambda scopes: MatMul4Bit.apply(x).sum()) == {BASE: 7 * 4}


def test_what_is_not_kept_after_all_does_not_count():
    x = leaf(10, 4)

    def forward(scopes):
        F.silu(x)  # its graph goes at once
        return x.sum()

    assert kept(forward) == {}
