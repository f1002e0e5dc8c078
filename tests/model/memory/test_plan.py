"""The parts of a planned step: by hand, and against the tensors that a real step makes and keeps."""

import shutil

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.batch import BatchShape, shape_of_batch
from qlora_lightning.model.build import fuse, meta_base, meta_copy, put_adapters
from qlora_lightning.model.kernels import library
from qlora_lightning.model.layout import IGNORED
from qlora_lightning.model.memory.layer_memory import LiveBytes
from qlora_lightning.model.memory.plan import PARTS, StepSettings, count_optimizer_bytes, plan_memory
from qlora_lightning.support.versions import enable_activation_checkpointing
from tests import steps

SHORT, LONG = (65, 33, 129), (513, 9, 521)


def settings(device="cpu", dtype=torch.bfloat16, **changes):
    usual = {"quantization": "nf4", "double_quant": False, "optimizer": None, "process": 1000}
    return StepSettings(device, dtype, **{**usual, **changes})


# ---- beside real steps -----------------------------------------------------------------------------------------------


def make(tiny_base, every_n_layers=0, **options):
    module = QLoRAModule(str(tiny_base), **{"rank": 4, "compute_dtype": "bf16", **options})
    module.configure_model()
    if every_n_layers:
        enable_activation_checkpointing(module.causal_lm, every_n_layers)
    return module


def make_batch(lengths, shared=0):
    """Half of each sample is labelled; so many tokens at its begin are those of all others."""
    batch = steps.make_batch(lengths, vocabulary=40_000)
    for start, length in zip(batch["cu_seqlens"].tolist(), lengths, strict=False):
        batch["input_ids"][0, start : start + shared] = torch.arange(shared)
        batch["labels"][0, start : start + (length + 1) // 2] = IGNORED
    return batch


def step_beside_plan(module, batch, **changes):
    """Return the parts that are planned of a step; the bytes that its forward leaves, and the most that it has."""
    for tensor in trainable_tensors(module).values():
        tensor.grad = torch.zeros_like(tensor)
    with LiveBytes() as live:
        loss = module.compute_loss(batch).nll_sum
        saved = live.now
        loss.backward()
    shape, dtype = shape_of_batch(batch), getattr(torch, module.identity["compute_dtype"])
    hollow = meta_copy(module.model, dtype, module.quantization, module.fast)
    step = settings(dtype=dtype, autocasts=module.autocast_dtype is not None, **changes)
    shape = shape if module.leaves_out_unneeded else shape.whole()
    return plan_memory(hollow, shape, step).parts, saved, live.peak


@pytest.mark.parametrize(("lengths", "shared"), [(SHORT, 0), (LONG, 0), ((97, 145, 97), 48)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": "last:1"},
        {"target_modules": ["down_proj"], "layers": [0]},
        {"target_modules": ["o_proj"]},
        {"compute_dtype": "fp32", "quantization": "none"},
    ],
    ids=str,
)
def test_fused_layers_save_what_is_planned(tiny_base, options, lengths, shared):
    batch = make_batch(lengths, shared)
    assert shape_of_batch(batch).computed == sum(lengths) - 3 - 2 * shared  # once what they share, and no last token
    parts, saved, _ = step_beside_plan(make(tiny_base, **options), batch)
    assert parts["activations"] == pytest.approx(saved, rel=0.02)


def test_without_the_loops_attention_saves_what_torchs_does(tiny_base, monkeypatch):
    library.load_library.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    try:
        for lengths, shared in ((SHORT, 0), ((97, 145, 97), 48)):
            parts, saved, _ = step_beside_plan(make(tiny_base), make_batch(lengths, shared))
            assert parts["activations"] == pytest.approx(saved, rel=0.05)
    finally:
        library.load_library.cache_clear()


PEFTS = (
    {"fast": False},
    {"dropout": 0.1},
    {"quantization": "int8"},
    {"lora_options": {"trainable_token_indices": [7]}},
    {"lora_options": {"use_dora": True}},
)


@pytest.mark.parametrize(
    ("every_n_layers", "options"), [(2, {}), *((every, each) for every in (0, 1) for each in PEFTS)], ids=str
)
def test_checkpointed_layers_and_those_of_peft_save_about_what_is_planned(tiny_base, every_n_layers, options):
    module = make(tiny_base, every_n_layers, **options)
    parts, saved, _ = step_beside_plan(module, make_batch((161, 161)), every_n_layers=every_n_layers)
    assert parts["activations"] == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize(
    ("every_n_layers", "options"),
    [(0, {}), (1, {}), (1, {"layers": "last:1"}), (1, {"compute_dtype": "fp32"}), (0, {"fast": False})],
    ids=str,
)
def test_the_tensors_of_a_step_take_at_most_about_what_is_planned(tiny_base, every_n_layers, options):
    batch = make_batch((900, 700, 1100))
    batch["labels"][0, :-2] = IGNORED  # few logits, which would outweigh all else
    module = make(tiny_base, every_n_layers, **options)
    parts, saved, peak = step_beside_plan(module, batch, every_n_layers=every_n_layers)
    assert parts["activations"] == pytest.approx(saved, rel=0.03)
    assert 0.95 < sum(parts[name] for name in ("activations", "logits", "workspace")) / peak < 1.25


# ---- by hand ---------------------------------------------------------------------------------------------------------

BATCH = BatchShape((40, 24), labelled=32)
# A and B of rank 2 of seven linears in two layers: 64 → 64, 32, 32, 64; 64 → 128 twice; 128 → 64
TRAINED = 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
SHAPES = {(2, 64): 12, (2, 128): 2, (64, 2): 6, (32, 2): 4, (128, 2): 4}


@pytest.fixture(scope="module")
def small():
    """A hollow model of two layers; its head is its embedding, of a hundred tokens."""
    return build(tie_word_embeddings=True)


def build(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**{**sizes, "vocab_size": 100, "num_hidden_layers": 2, **changes})
    model = put_adapters(meta_base(config, torch.bfloat16, "nf4"), rank=2)
    fuse(model, fast=True)
    return model


def test_every_part_is_there(small):
    parts = plan_memory(small, BATCH, settings()).parts
    assert list(parts) == list(PARTS)
    # linears in 4 bits and a scale for 64 numbers; five norms and the embedding in bf16
    linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert parts["base"] == linears // 2 + 4 * linears // 64 + 2 * (5 * 64 + 100 * 64)
    assert parts["adapters"] == parts["gradients"] == 4 * TRAINED
    assert parts["optimizer"] == 8 * TRAINED + 4 * sum(SHAPES.values())
    assert parts["logits"] == 32 * 100 * 2
    assert parts["process"] == 1000
    assert plan_memory(small, BatchShape((9000,), 8000), settings()).parts["logits"] == 512 * 100 * 2  # of a chunk
    on_cuda = plan_memory(small, BATCH, settings("cuda")).parts
    assert (on_cuda["kernels"], on_cuda["base"]) == (0, parts["base"])
    assert on_cuda["activations"] > parts["activations"]  # attention's output too


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, 8 * TRAINED + 4 * 28),  # two averages, and a count for each tensor
        ("torch.optim.AdamW", 8 * TRAINED + 4 * 28),
        ("torch.optim.SGD", 0),
        ({"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}, 4 * TRAINED),
    ],
)
def test_optimizers_keep_averages(choice, expected):
    assert count_optimizer_bytes(SHAPES, choice) == expected


@pytest.mark.parametrize("shape", [(64, 1024), (16, 16), (7, 640)])
def test_eight_bit_averages_are_counted_as_bitsandbytes_has_them(shape):
    name = "bitsandbytes.optim.AdamW8bit"
    by_formula, by_a_step = (count_optimizer_bytes({shape: 3}, each) for each in (name, {"class_path": name}))
    assert by_formula == by_a_step
    assert count_optimizer_bytes({(64, 1024): 1}, name) == 2 * (65_536 + 4 * 256)  # a scale for each 256 numbers


def test_of_a_mapped_embedding_only_what_tokens_read_is_in_memory(small):
    def base(model, ids=None, device="cpu"):
        return plan_memory(model, BATCH, settings(device, ids=ids)).parts["base"]

    untied, ids = build(vocab_size=4096), np.array([0, 1, 1, 600], dtype=np.int32)
    # 64 KiB around an address are mapped: 512 rows of 64 numbers, of which there are eight
    assert base(untied) - base(untied, ids) == 6 * 65_536
    assert base(untied, ids, "cuda") == base(untied)
    assert base(small, ids[:3]) == base(small)  # the head reads all of one that it shares
