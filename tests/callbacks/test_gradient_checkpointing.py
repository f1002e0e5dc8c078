import pytest
import torch
from lightning import Callback
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning import GradientCheckpointing
from qlora_lightning.support.errors import UserError


class LayerRuns(Callback):
    """Counts, for each decoder layer, how often its inside runs in a training batch; keeps the first gradients."""

    def __init__(self):
        self.runs, self.gradients = [], None

    def on_train_start(self, trainer, pl_module):
        layers = [layer for layer in pl_module.modules() if isinstance(layer, GradientCheckpointingLayer)]
        self.runs = [0] * len(layers)
        for number, layer in enumerate(layers):
            layer.self_attn.register_forward_pre_hook(lambda *_, number=number: self._count(number))

    def _count(self, number):
        self.runs[number] += 1

    def on_after_backward(self, trainer, pl_module):
        if self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.requires_grad}


ONE_BATCH = {"limit_train_batches": 1, "limit_val_batches": 0}


@pytest.mark.parametrize(
    ("callback", "runs"),
    [
        (GradientCheckpointing(), [2, 2]),
        (GradientCheckpointing(every_n_layers=2), [2, 1]),
        (GradientCheckpointing(enabled=False), [1, 1]),
    ],
)
def test_backward_runs_every_nth_layer_again(fit, callback, runs):
    fit(callback, counter := LayerRuns(), **ONE_BATCH)
    assert counter.runs == runs


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"fast": False}])
def test_gradients_are_bit_for_bit_those_without_it(fit, make_module, assert_same, options):
    fit(plain := LayerRuns(), module=make_module(**options), **ONE_BATCH)
    fit(GradientCheckpointing(), checkpointed := LayerRuns(), module=make_module(**options), **ONE_BATCH)
    assert any(gradient.any() for gradient in plain.gradients.values())
    assert_same(checkpointed.gradients, plain.gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.1])  # fused layers, and plain ones
def test_a_whole_run_is_bit_for_bit_that_without_it(fit, make_module, adapter_of, assert_same, dropout):
    options = {"accumulate_grad_batches": 2, "val_check_interval": 4, "limit_val_batches": 1}
    _, plain = fit(module=make_module(dropout=dropout), **options)
    _, checkpointed = fit(GradientCheckpointing(), module=make_module(dropout=dropout), **options)
    assert_same(adapter_of(checkpointed), adapter_of(plain))


def checkpointing_of(module):
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    found = {part: [vars(part).get(name) for name in names] for part in module.causal_lm.modules()}
    return found | {"embedding": dict(module.causal_lm.get_input_embeddings()._forward_hooks)}


class Fails(Callback):
    def on_train_batch_end(self, *_):
        raise KeyError


def test_a_model_is_left_as_it_was_also_by_a_fit_that_fails(fit, make_module):
    module = make_module()
    module.configure_model()
    before = checkpointing_of(module)
    fit(GradientCheckpointing(every_n_layers=2), module=module, **ONE_BATCH)
    assert checkpointing_of(module) == before
    with pytest.raises(KeyError):
        fit(GradientCheckpointing(), Fails(), module=module, **ONE_BATCH)
    assert checkpointing_of(module) == before


@pytest.mark.parametrize("every_n_layers", [0, -1])
def test_every_n_layers_below_one_is_refused(every_n_layers):
    with pytest.raises(UserError, match=rf"gradient_checkpointing\.every_n_layers is {every_n_layers}: expected 1"):
        GradientCheckpointing(every_n_layers=every_n_layers)


def test_less_is_kept_between_forward_and_backward(fit):
    kept = {}

    class Saved(Callback):
        """Counts the bytes of the tensors that autograd saves."""

        def __init__(self, name):
            self.name = name

        def on_train_batch_start(self, *_):
            kept[self.name] = 0

            def pack(tensor):
                kept[self.name] += tensor.nbytes
                return tensor

            self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            self.hooks.__enter__()

        def on_before_backward(self, *_):
            self.hooks.__exit__()

    fit(Saved("plain"), **ONE_BATCH)
    fit(Saved("checkpointed"), GradientCheckpointing(), **ONE_BATCH)
    assert kept["checkpointed"] < kept["plain"] / 2


class OwnFunctions(Callback):
    """Names the autograd functions of ours behind a loss."""

    def on_before_backward(self, trainer, pl_module, loss):
        nodes, self.names = {loss.grad_fn}, set()
        for node in (ahead := list(nodes)):
            function = getattr(node, "_forward_cls", None)
            if function is not None and function.__module__.startswith("qlora_lightning"):
                self.names.add(function.__name__)
            new = {each for each, _ in node.next_functions if each is not None} - nodes
            nodes |= new
            ahead += new


@pytest.mark.parametrize("callbacks", [[], [GradientCheckpointing()]])
def test_without_fast_no_function_of_ours_is_behind_the_loss(fit, make_module, callbacks):
    fit(*callbacks, fast := OwnFunctions(), **ONE_BATCH)
    fit(*callbacks, plain := OwnFunctions(), module=make_module(fast=False), **ONE_BATCH)
    assert "_FrozenHeadLoss" in fast.names
    assert ("_CopyApart" in fast.names) == bool(callbacks)
    assert plain.names == set()
