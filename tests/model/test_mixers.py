"""Layers with a state in packed batches: each sample is computed as alone, whatever is beside it."""

import itertools
import os

import pytest
import torch

from qlora_lightning import PreferenceModule
from qlora_lightning.model.activation_checkpointing import enable_activation_checkpointing
from qlora_lightning.model.layers.experts import experts_of
from qlora_lightning.model.model_types import RECURRENT_TYPES
from qlora_lightning.model.step.layout import sequences_of_lengths
from tests import families
from tests.processes import run_python
from tests.steps import distance, loss_and_gradients, make_batch, make_module

QUICK = ("qwen3_5_text", "lfm2")
TYPES = [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in RECURRENT_TYPES]
SHARED = 60
LENGTHS = (70, 5, 75, 80, 1, 140)


def batch_beginning_alike():
    """Make samples of unlike lengths; the first and the third begin with the same tokens, without labels."""
    batch = make_batch(LENGTHS)
    starts = batch["cu_seqlens"].tolist()
    batch["input_ids"][0, starts[2] : starts[2] + SHARED] = batch["input_ids"][0, :SHARED]
    for start in (0, starts[2]):
        batch["labels"][0, start : start + SHARED] = -100
    return batch


def step_of_rows_alone(module, batch):
    """Return the mean loss, and all gradients, of rows that each go through the model alone."""
    module.token_budget.tokens = 1
    rows = [row for row in module.cutter.cut(batch) if (row["labels"] != -100).any()]
    labels = [int((row["labels"] != -100).sum()) for row in rows]
    losses, gradients = zip(*(loss_and_gradients(module, row) for row in rows), strict=True)
    loss = sum(count * each for count, each in zip(labels, losses, strict=True)) / sum(labels)
    return loss, sum(gradients)


def assert_same_step(one, other):
    """To what `python -m tests.families` asks for: some scans add up in another order."""
    assert abs(one[0] / other[0] - 1) <= 1e-5
    assert distance(one[1], other[1]) <= 1e-4


def build(tmp_path, model_type, **options):
    base = families.save_random(tmp_path / "base", model_type)
    return make_module(base, **{"quantization": "none", **options})


def test_samples_of_similar_lengths_are_side_by_side():
    groups = sequences_of_lengths((70, 5, 160, 150, 3)).groups
    assert groups.shapes == ((2, 160), (1, 70), (2, 5))  # beside longer ones more than a fifth would be padding
    index = groups.expanded.gather_index.tolist()
    assert index[:320] == [*range(75, 235), *range(235, 385), *[384] * 10]
    assert index[320:] == [*range(75), 385, 386, 387, 387, 387]
    assert groups.expanded.gather_index[groups.expanded.first_expanded].tolist() == [*range(388)]
    assert [sequences_of_lengths(each).groups.is_stream for each in ((64, 64), (9,), (3, 9))] == [True, True, False]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_packed_step_is_that_of_rows_alone_also_where_samples_begin_alike(model_type, tmp_path):
    module, batch = build(tmp_path, model_type), batch_beginning_alike()
    packed = loss_and_gradients(module, batch)
    n_tokens = module.micro_batch_of(batch).input_ids.shape[1]
    assert n_tokens == sum(LENGTHS) - SHARED - 4  # the last of a sample is only predicted, and one has no label
    assert_same_step(step_of_rows_alone(module, batch), packed)
    plain = make_module(tmp_path / "base", quantization="none", fast=False)
    assert_same_step(loss_and_gradients(plain, batch), packed)


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES)
def test_no_other_sample_changes_a_bit_of_one(model_type, tmp_path):
    module, batch = build(tmp_path, model_type).eval(), make_batch(LENGTHS)
    others, has_experts = make_batch(LENGTHS, seed=2)["input_ids"], bool(experts_of(module.causal_lm))

    def states(ids):
        micro_batch = module.micro_batch_of({**batch, "input_ids": ids})
        return module.last_states(micro_batch)[0].split(micro_batch.counts)

    together = states(batch["input_ids"])
    for sample, (start, end) in enumerate(itertools.pairwise(batch["cu_seqlens"].tolist())):
        ids = others.clone()
        ids[:, start:end] = batch["input_ids"][:, start:end]
        found = states(ids)[sample]
        # in a mixture the number of rows of an expert's product, and so the order of its sums, is up to all samples
        assert torch.equal(found, together[sample]) or (has_experts and distance(found, together[sample]) <= 1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_checkpointing_changes_no_bit_also_with_dropout(model_type, tmp_path):
    dropout = 0.0 if model_type == "qwen3_next" else 0.1  # whose MLPs beside experts take none
    module, batch, steps = build(tmp_path, model_type, dropout=dropout), batch_beginning_alike(), []
    for checkpointed in (False, True):
        if checkpointed:
            enable_activation_checkpointing(module.causal_lm)
        module.choose_layers()
        torch.manual_seed(1)
        steps.append(loss_and_gradients(module, batch))
    assert steps[0][0] == steps[1][0]
    assert torch.equal(steps[0][1], steps[1][1])


@pytest.mark.parametrize("model_type", TYPES)
def test_a_step_on_preferences_is_that_of_the_plain_path(model_type, tmp_path):
    base, batch = families.save_random(tmp_path, model_type), make_batch((70, 40, 75, 80))
    batch["input_ids"][0, 70:100] = batch["input_ids"][0, :30]  # two answers to one prompt
    batch["labels"][0, :30] = batch["labels"][0, 70:100] = -100
    batch |= {"pairs": True}
    options = {"cls": PreferenceModule, "quantization": "none"}
    steps = [loss_and_gradients(make_module(base, fast=fast, **options), batch) for fast in (True, False)]
    assert_same_step(*steps)


def test_what_others_set_on_a_mixer_sees_whole_rows(tmp_path):
    """As accelerate does to spread a model over devices: it replaces ``forward`` of the module."""
    module, batch = build(tmp_path, "lfm2"), make_batch(LENGTHS)
    expected, lengths = loss_and_gradients(module, batch), []
    mixer = next(layer.conv for layer in module.causal_lm.model.layers if hasattr(layer, "conv"))
    forward = mixer.forward
    mixer.forward = lambda states: [lengths.append(states.shape[:2]), forward(states)][1]
    module.choose_layers()
    assert_same_step(loss_and_gradients(module, batch), expected)
    assert sum(rows for rows, _ in lengths) == len(LENGTHS)


# ---- beside kernels --------------------------------------------------------------------------------------------------

_KERNELS = {  # what the packages compute, in torch, a sample after the other
    "causal_conv1d": """
def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None, **_):
    calls.append(seq_idx)
    lengths = seq_idx.flatten().bincount().tolist()
    parts = []
    for part in x.split(lengths, dim=-1):
        out = F.conv1d(part, weight[:, None], bias, padding=weight.shape[-1] - 1, groups=len(weight))
        parts.append(out[..., : part.shape[-1]])
    out = torch.cat(parts, -1)
    return out if activation is None else F.silu(out)
""",
    "fla": """
def chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens=None, use_qk_l2norm_in_kernel=False, **_):
    calls.append(cu_seqlens)
    assert use_qk_l2norm_in_kernel and q.shape[0] == 1
    groups = v.shape[2] // k.shape[2]
    q, k = (F.normalize(each[0], dim=-1).repeat_interleave(groups, 1) for each in (q, k))
    v, g, beta, outputs = v[0], g[0].exp()[..., None, None], beta[0][..., None], []
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        state = v.new_zeros(v.shape[1], k.shape[-1], v.shape[-1])  # of each head
        for t in range(start, end):
            state = state * g[t]
            change = beta[t] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
            state = state + k[t][..., None] * change[:, None]
            outputs.append(torch.einsum("hkv,hk->hv", state, q[t]) * k.shape[-1] ** -0.5)
    return torch.stack(outputs)[None], None
""",
}
_STEP = """
import sys, torch
from pathlib import Path
import causal_conv1d, fla
from transformers.integrations import hub_kernels
for package in ("causal_conv1d", "fla"):
    hub_kernels._PACKAGE_SUPPORTED_DEVICES[package] = ("cpu",)
from qlora_lightning.model.layers import mixer
from tests.model.test_mixers import batch_beginning_alike, build, loss_and_gradients
module, batch = build(Path(sys.argv[2]), sys.argv[1]), batch_beginning_alike()
mixer.has_kernels = lambda device, delta_rule: True
step = loss_and_gradients(module, batch)
n_mixers = sum(isinstance(each, mixer.PackedMixer) for each in module.modules())
n_delta = n_mixers * (sys.argv[1] not in mixer._CONVOLUTION)
assert (len(causal_conv1d.calls), len(fla.calls)) == (n_mixers, n_delta), (causal_conv1d.calls, fla.calls)
torch.save(step, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "lfm2", "lfm2_moe"]
)
def test_kernels_that_are_installed_get_the_bounds_of_samples_in_one_call(model_type, tmp_path):
    for name, code in _KERNELS.items():
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        (tmp_path / f"{name}.py").write_text(f"import torch\nimport torch.nn.functional as F\ncalls = []\n{code}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    run_python("-c", _STEP, model_type, tmp_path / "module", tmp_path / "step.pt", env=environment)
    module = make_module(tmp_path / "module" / "base", quantization="none")
    with_kernels, without = torch.load(tmp_path / "step.pt"), loss_and_gradients(module, batch_beginning_alike())
    assert abs(with_kernels[0] / without[0] - 1) <= 1e-5
    assert distance(with_kernels[1], without[1]) <= 1e-3  # a token after the other, where chunks are solved without
