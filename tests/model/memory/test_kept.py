"""What the formulas say against what autograd keeps: the whole graph is walked, each storage counted once."""

import itertools
import shutil

import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.commands.profile.kept import KeptTensors
from qlora_lightning.commands.profile.parts import Widths
from qlora_lightning.commands.profile.scopes import Scopes
from qlora_lightning.model.batch import BatchShape, shape_of_batch
from qlora_lightning.model.kernels import library
from qlora_lightning.model.layout import IGNORED
from qlora_lightning.model.memory import kept
from qlora_lightning.model.memory.kept import (
    kept_by_layers,
    kept_outside,
    room_of_backward,
    room_of_logits,
)
from qlora_lightning.model.memory.shapes import LayerShape, LinearShape, checkpoint_layers, read_model
from qlora_lightning.support.versions import enable_activation_checkpointing

NO_WIDTHS = Widths(frozenset(), 0, 0)


def make(tiny_base, every_n_layers=0, **options):
    module = QLoRAModule(str(tiny_base), **{"rank": 4, "compute_dtype": "bf16", **options})
    module.configure_model()
    if every_n_layers:
        enable_activation_checkpointing(module.causal_lm, every_n_layers)
    return module


def kept_in_truth(module, lengths, shared=0):
    """Give the bytes that a forward pass keeps, and the shape of its batch; half of each sample is labelled.

    So many tokens at the begin of each sample are those of all others.
    """
    bounds = [0, *itertools.accumulate(lengths)]
    ids = torch.randint(5, 40_000, (1, bounds[-1]), generator=torch.Generator().manual_seed(1))
    for start in bounds[:-1]:
        ids[0, start : start + shared] = torch.arange(shared)
    labels = ids.clone()
    for start, length in zip(bounds, lengths, strict=False):
        labels[0, start : start + (length + 1) // 2] = IGNORED
    batch = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "longest": max(lengths),
    }
    watched = KeptTensors(module.model, Scopes(), NO_WIDTHS)
    watched.start()
    loss = module.compute_loss(batch).nll_sum
    watched.stop()
    shape = shape_of_batch(batch)
    return sum(watched.bytes_by_part(loss).values()), shape if module.leaves_out_unneeded else shape.whole()


def kept_by_formula(module, batch, every_n_layers=0, e=2):
    layers = checkpoint_layers(read_model(module.model, e), every_n_layers).layers
    return kept_by_layers(layers, batch, e, "cpu") + kept_outside(layers, batch, e)


@pytest.mark.parametrize("lengths", [(65, 33, 129), (513, 9, 521)], ids=["short samples", "about 512 tokens"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": "last:1"},
        {"target_modules": "attention"},
        {"target_modules": "mlp"},
        {"target_modules": ["down_proj"], "layers": [0]},
        {"target_modules": ["o_proj"]},
        {"compute_dtype": "fp32", "quantization": "none"},
    ],
    ids=str,
)
def test_the_fused_path_keeps_what_the_formulas_say(tiny_base, options, lengths):
    module = make(tiny_base, **options)
    truth, batch = kept_in_truth(module, lengths)
    e = 4 if options.get("compute_dtype") == "fp32" else 2
    assert kept_by_formula(module, batch, e=e) == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("lengths", [(65, 33, 129), (513, 9, 521)], ids=["short samples", "about 512 tokens"])
def test_without_the_loops_attention_keeps_what_torchs_does(tiny_base, lengths, monkeypatch):
    library.load_library.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    try:
        truth, batch = kept_in_truth(module := make(tiny_base), lengths)
        assert kept_by_formula(module, batch) == pytest.approx(truth, rel=0.05)
    finally:
        library.load_library.cache_clear()


@pytest.mark.parametrize("lengths", [(97, 145, 97), (513, 105, 137)], ids=["short samples", "about 512 tokens"])
def test_what_samples_share_is_kept_once(tiny_base, lengths):
    module = make(tiny_base)
    truth, batch = kept_in_truth(module, lengths, shared=48)
    assert batch.computed == sum(lengths) - 3 - 2 * 48
    assert kept_by_formula(module, batch) == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"layers": "last:1"}], ids=str)
@pytest.mark.parametrize("every_n_layers", [1, 2])
def test_checkpointed_layers_keep_their_input(tiny_base, every_n_layers, options):
    module = make(tiny_base, every_n_layers, **options)
    truth, batch = kept_in_truth(module, (161, 161))
    assert kept_by_formula(module, batch, every_n_layers) == pytest.approx(truth, rel=0.03)


@pytest.mark.parametrize(
    "options",
    [{"fast": False}, {"dropout": 0.1}, {"quantization": "int8"}, {"lora_options": {"trainable_token_indices": [7]}}],
    ids=str,
)
def test_the_plain_path_is_an_estimate(tiny_base, options):
    module = make(tiny_base, **options)
    truth, batch = kept_in_truth(module, (161, 161))
    assert not any(layer.fused for layer in read_model(module.model).layers)
    assert kept_by_formula(module, batch) == pytest.approx(truth, rel=0.25)


def layer(**settings):
    narrow = {name: LinearShape(8, 8, rank=2) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    wide = {name: LinearShape(8, 32, rank=2) for name in ("gate_proj", "up_proj")}
    return LayerShape({**narrow, **wide, "down_proj": LinearShape(32, 8, rank=2)}, heads=2, **settings)


@pytest.fixture
def loops(monkeypatch):
    """Attention goes by the C++ loops, whatever this CPU has."""
    monkeypatch.setattr(kept, "attends_in", lambda dtype: True)


@pytest.mark.usefixtures("loops")
def test_a_layer_is_counted_by_hand():
    batch = BatchShape((3, 2), labelled=4)
    # two norms' inputs and inverse roots, products with A of seven linears, queries, keys, values, their normalizers in
    # two heads, output, gate, up
    per_token = 2 * (8 * 2 + 4) + 7 * 2 * 2 + 3 * 8 * 2 + 2 * 4 + 8 * 2 + 2 * 32 * 2
    assert kept_by_layers([layer()], batch, 2, "cpu") == 5 * per_token
    # inputs, and the last linear's product with A
    assert kept_by_layers([layer(checkpointed=True)] * 3, batch, 2, "cpu") == 3 * 5 * (8 + 2) * 2
    on_cuda = 5 * (per_token + 8 * 2)  # attention's output too
    assert kept_by_layers([layer()], batch, 2, "cuda") == on_cuda


def test_what_lies_below_all_adapters_keeps_nothing():
    bare = LayerShape({name: LinearShape(8, 8) for name in layer().linears}, heads=2, input_trains=False)
    assert kept_by_layers([bare], BatchShape((5,), 4), 2, "cpu") == 0


@pytest.mark.usefixtures("loops")
def test_a_checkpointed_layer_is_made_again_in_backward():
    batch = BatchShape((3, 2), 4)
    again = kept_by_layers([layer()], batch, 2, "cpu")
    more = room_of_backward([layer(checkpointed=True)], batch, 2, "cpu") - room_of_backward([layer()], batch, 2, "cpu")
    assert more == again


def test_no_more_logits_than_a_chunk_exist():
    assert room_of_logits(BatchShape((9,), 8), vocabulary=100, e=2) == 8 * 100 * 2
    assert room_of_logits(BatchShape((9000,), 8000), vocabulary=100, e=2) == 512 * 100 * 2
