from types import SimpleNamespace

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface

from qlora_lightning.commands.profile.parts import ACTIVATION, ATTENTION, BASE, DATA, HEAD, NORMS, REST, name_scope
from qlora_lightning.commands.profile.scopes import ActionRanges, Scopes, marking_parts


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
