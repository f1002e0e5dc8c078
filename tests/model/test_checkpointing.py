"""Inputs of checkpointed layers in pages of their own: nothing else changes, and the system has them back."""

import functools
import gc

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_lightning.model.layers.checkpointing import keep_inputs_apart

MIB = 1 << 20


class Layer(nn.Module):
    """As transformers' layers are checkpointed: through a function that the layer holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    def inside(self, hidden, factor):
        self.seen = hidden.data_ptr()
        return torch.tanh(self.linear(hidden)) * factor

    def forward(self, hidden, factor=2.0):
        return self._gradient_checkpointing_func(self.inside, hidden, factor)


def test_a_layer_is_given_a_copy_and_computes_the_same():
    plain, apart = Layer(), Layer()
    keep_inputs_apart([apart])
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    results = []
    for layer in (plain, apart):
        output = layer(x)
        results.append([output, *torch.autograd.grad(output.sum(), [x, layer.linear.weight])])
    assert all(map(torch.equal, *results))
    assert plain.seen == x.data_ptr()
    assert apart.seen != x.data_ptr()


def test_a_dropped_input_goes_back_to_the_system():
    layer, seen = Layer(), []
    keep_inputs_apart([layer])
    layer._gradient_checkpointing_func(seen.append, torch.zeros(64 * MIB // 4))
    with_input = psutil.Process().memory_info().rss
    seen.clear()
    gc.collect()
    assert with_input - psutil.Process().memory_info().rss > 60 * MIB
