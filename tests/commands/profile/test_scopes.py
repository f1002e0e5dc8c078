from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface

from qlora_lightning import QLoRAModule
from qlora_lightning.commands.profile.parts import ACTIVATION, ATTENTION, BASE, DATA, HEAD, NORMS, REST, name_scope
from qlora_lightning.commands.profile.scopes import ActionRanges, Scopes, marking_parts
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer


class Part(nn.Module):
    """Notes the part that it runs in."""

    def __init__(self, scopes):
        super().__init__()
        self.scopes = scopes

    def forward(self):
        return self.scopes.part


class Module:
    """As much of QLoRAModule as is looked at."""

    def __init__(self, scopes):
        self.scopes = scopes
        self.causal_lm = nn.Module()
        self.causal_lm.norm, self.causal_lm.mlp, self.causal_lm.up_proj = (Part(scopes) for _ in range(3))
        self.causal_lm.config = SimpleNamespace(_attn_implementation="of_a_test")

    def compute_loss(self):
        return [self.scopes.part, self.causal_lm.norm(), self.causal_lm.mlp(), self.causal_lm.up_proj()]


def test_parts_are_marked_without_hooks_and_left_as_they_were(monkeypatch):
    scopes = Scopes()
    monkeypatch.setitem(AttentionInterface._global_mapping, "of_a_test", lambda: scopes.part)
    module = Module(scopes)
    with marking_parts(module, scopes):
        assert module.compute_loss() == [HEAD, NORMS, ACTIVATION, BASE]
        assert AttentionInterface()["of_a_test"]() == ATTENTION
        assert not module.causal_lm.norm._forward_hooks
        assert not module.causal_lm.norm._forward_pre_hooks
    assert module.compute_loss() == [REST] * 4
    assert AttentionInterface()["of_a_test"]() == REST
    assert "forward" not in vars(module.causal_lm.norm)


def fused_while_marked(base, monkeypatch, **options):
    """Whether each layer runs fused while parts are marked, and the names of those that are."""
    torch.manual_seed(0)
    module = QLoRAModule(str(base), rank=2, **options)
    module.configure_model()
    found = []
    asked = FusedDecoderLayer._fuses
    monkeypatch.setattr(FusedDecoderLayer, "_fuses", lambda *inputs: found.append(asked(*inputs)) or found[-1])
    ids = torch.randint(5, 500, (1, 9))
    flat = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(9)[None], "longest": 9}
    with marking_parts(module, Scopes(), autocasts=module.autocast_dtype is not None):
        module.compute_loss(flat | {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)})
        marked = [name for name, part in module.causal_lm.named_modules() if "forward" in vars(part)]
    return found, marked


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_what_runs_fused_does_so_while_parts_are_marked(tiny_base, monkeypatch, compute_dtype):
    found, marked = fused_while_marked(tiny_base, monkeypatch, compute_dtype=compute_dtype)
    assert found == [True, True]
    assert marked == ["model", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb"]


def test_plain_layers_are_marked_and_their_linears_run_fused(tiny_base, monkeypatch):
    options = {"lora_options": {"trainable_token_indices": [5]}, "compute_dtype": "bf16"}
    found, marked = fused_while_marked(tiny_base, monkeypatch, **options)
    assert found == [False, False]
    assert "model.layers.0.mlp" in marked
    assert "model.layers.1.input_layernorm" in marked
    assert not any("_proj" in name for name in marked)


def test_lightnings_actions_are_ranges():
    scopes = Scopes()
    ranges = ActionRanges(scopes)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, ranges.profile("run_training_epoch"):
        with ranges.profile("[_TrainingEpochLoop].train_dataloader_next"):
            assert scopes.part == DATA
            torch.ones(1)
        assert scopes.part == REST
    names = [event.name for event in profiler.events()]
    assert name_scope(DATA, whole=True) in names
    assert not any("run_training_epoch" in name for name in names)
