"""Gradient checkpointing keeps less and computes the same bits."""

import pytest
import torch
from lightning import Callback

from qlora_lightning import GradientCheckpointing
from tests.equality import same


class Watch(Callback):
    """The bytes that autograd keeps, and the gradients."""

    def __init__(self):
        self.kept_bytes, self.gradients = 0, None

    def setup(self, trainer, pl_module, stage):
        compute_loss = pl_module.compute_loss

        def watched(batch):
            if not pl_module.training:
                return compute_loss(batch)  # of the check that its sums add up
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                return compute_loss(batch)

        pl_module.compute_loss = watched

    def teardown(self, trainer, pl_module, stage):
        del pl_module.compute_loss

    def _pack(self, tensor):
        self.kept_bytes += tensor.nbytes
        return tensor

    def on_after_backward(self, trainer, pl_module):
        self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.requires_grad}


ONE_BATCH = {"limit_train_batches": 1, "limit_val_batches": 0}


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"fast": False}])
def test_layers_keep_less_and_give_the_same_bits(fit, make_module, options):
    fit(GradientCheckpointing(False), plain := Watch(), module=make_module(**options), **ONE_BATCH)
    module = make_module(**options)
    fit(GradientCheckpointing(True), checkpointed := Watch(), module=module, **ONE_BATCH)
    assert not module.causal_lm.get_input_embeddings()._forward_hooks
    assert checkpointed.kept_bytes < plain.kept_bytes / 2
    assert any(gradient.any() for gradient in plain.gradients.values())
    assert same(checkpointed.gradients, plain.gradients)


@pytest.mark.parametrize("options", [{}, {"layers": [0], "target_modules": ["down_proj"]}], ids=str)
def test_long_rows_take_the_mlp_in_pieces_and_give_the_same_numbers(fit, make_module, monkeypatch, options):
    fit(plain := Watch(), module=make_module(**options), **ONE_BATCH)
    monkeypatch.setattr("qlora_lightning.model.layers.decoder_layer.PIECE_TOKENS", 16)
    fit(GradientCheckpointing(True), pieces := Watch(), module=make_module(**options), **ONE_BATCH)
    assert any(gradient.any() for gradient in plain.gradients.values())
    for name, gradient in plain.gradients.items():  # sums of pieces are rounded otherwise
        assert (pieces.gradients[name] - gradient).norm() <= 0.01 * gradient.norm()
