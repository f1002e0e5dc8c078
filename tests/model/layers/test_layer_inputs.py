import copy
import functools
import gc
import pickle

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
        self.linear = nn.Linear(4, 4)
        self.seen = None
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)  # as transformers does

    def inside(self, hidden, factor):
        self.seen = hidden
        return torch.tanh(self.linear(hidden)) * factor

    def forward(self, hidden, factor):
        return self._gradient_checkpointing_func(self.inside, hidden, factor)


def run(apart):
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(3))
    if apart:
        keep_inputs_apart(layers)
    x = torch.randn(5, 4, requires_grad=True)
    hidden = x
    for layer in layers:
        hidden = layer(hidden, 2.0)
    hidden.sum().backward()
    return [hidden.detach(), x.grad, *(parameter.grad for parameter in layers.parameters())], x, layers


def test_results_and_gradients_are_the_same():
    (plain, _, _), (apart, _, _) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, apart, strict=True))


def test_a_layer_is_given_a_copy_and_the_input_stays_as_it_is():
    _, x, layers = run(True)
    assert layers[0].seen.data_ptr() != x.data_ptr()
    assert torch.equal(layers[0].seen, x)


def test_a_dropped_input_goes_back_to_the_system():
    layer = Layer()
    keep_inputs_apart([layer])
    seen = []
    layer._gradient_checkpointing_func(lambda hidden: seen.append(hidden), torch.zeros(64 * MIB // 4))
    with_input = psutil.Process().memory_info().rss
    seen.clear()
    layer.seen = None
    gc.collect()
    assert with_input - psutil.Process().memory_info().rss > 60 * MIB


def test_a_layer_can_be_copied_and_pickled():
    _, x, layers = run(True)
    layers[0].seen = None
    for copied in (copy.deepcopy(layers[0]), pickle.loads(pickle.dumps(layers[0]))):
        assert torch.equal(copied(x, 2.0), layers[0](x, 2.0))
        assert copied.seen.data_ptr() != x.data_ptr()
