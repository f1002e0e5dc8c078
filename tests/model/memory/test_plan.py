"""What a model and its step take: by hand, beside real steps, and by a hollow model that is the one without numbers."""

import json
import shutil
from collections import Counter
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from qlora_lightning.model.adapters.lora import add_adapters, trainable_tensors
from qlora_lightning.model.adapters.summary import adapter_table, bytes_by_dtype, count_parameters, describe_sizes
from qlora_lightning.model.cpu import library
from qlora_lightning.model.layers.attention import attends_in
from qlora_lightning.model.layers.lora import runs_fused
from qlora_lightning.model.load.base_model import load_base
from qlora_lightning.model.load.build import fuse, meta_base, meta_copy, put_adapters
from qlora_lightning.model.memory.layer_memory import LiveBytes
from qlora_lightning.model.memory.plan import (
    PARTS,
    STORAGES,
    StepSettings,
    count_optimizer_bytes,
    count_trained,
    name_storage,
    plan_memory,
    read_base,
)
from qlora_lightning.model.step.batch import BatchShape, shape_of_batch
from qlora_lightning.model.step.layout import IGNORED
from qlora_lightning.support.versions import enable_activation_checkpointing
from tests import steps

ROOT = Path(__file__).parents[3]
SHORT = (65, 33, 129)


def settings(device="cpu", dtype=torch.bfloat16, **changes):
    usual = {"quantization": "nf4", "double_quant": False, "optimizer": None, "process": 1000}
    return StepSettings(device, dtype, **{**usual, **changes})


def build(config, quantization="nf4", folder=None, fast=True, **options):
    base = meta_base(config, torch.bfloat16, quantization)
    options = options if folder else {"rank": 4, **options}
    model = put_adapters(base, folder, **options).to("meta")
    fuse(model, fast)
    return model


# ---- beside real steps -----------------------------------------------------------------------------------------------


def make(tiny_base, every_n_layers=0, **options):
    module = steps.make_module(tiny_base, **({"compute_dtype": "bf16"} | options))
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


@pytest.mark.parametrize(
    ("options", "lengths", "shared"),
    [
        *(({}, *batch) for batch in ((SHORT, 0), ((513, 9, 521), 0), ((97, 145, 97), 48))),
        ({"layers": "last:1"}, SHORT, 0),
        ({"target_modules": ["down_proj"], "layers": [0]}, SHORT, 0),
        ({"target_modules": ["o_proj"]}, SHORT, 0),
        ({"compute_dtype": "fp32", "quantization": "none"}, (97, 145, 97), 48),
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
        parts, saved, _ = step_beside_plan(make(tiny_base), make_batch((97, 145, 97), 48))
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
    ("every_n_layers", "options"), [(2, {}), (1, PEFTS[0]), *((0, each) for each in PEFTS)], ids=str
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
    batch = make_batch((450, 350, 550))
    batch["labels"][0, :-2] = IGNORED  # few logits, which would outweigh all else
    module = make(tiny_base, every_n_layers, **options)
    parts, saved, peak = step_beside_plan(module, batch, every_n_layers=every_n_layers)
    assert parts["activations"] == pytest.approx(saved, rel=0.03)
    assert 0.95 < sum(parts[name] for name in ("activations", "logits", "workspace")) / peak < 1.25


def test_tiles_of_the_mlp_take_about_what_is_planned_and_less_than_the_whole(tiny_base, monkeypatch):
    parts, module = [], make(tiny_base, 1)
    for tokens in (10_000, 256):
        for name in ("lora", "decoder_layer"):
            monkeypatch.setattr(f"qlora_lightning.model.layers.{name}.TILE_TOKENS", tokens)
        batch = make_batch((1350,))
        batch["labels"][0, :-2] = IGNORED
        planned, saved, peak = step_beside_plan(module, batch, every_n_layers=1)
        assert planned["activations"] == pytest.approx(saved, rel=0.03)
        assert 0.95 < sum(planned[name] for name in ("activations", "logits", "workspace")) / peak < 1.25
        parts.append(planned)
    assert parts[1]["workspace"] < 0.7 * parts[0]["workspace"]


# ---- by hand ---------------------------------------------------------------------------------------------------------

BATCH = BatchShape((40, 24), labelled=32)
# A and B of rank 2 of seven linears in two layers: 64 → 64, 32, 32, 64; 64 → 128 twice; 128 → 64
TRAINED = 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
SHAPES = {(2, 64): 12, (2, 128): 2, (64, 2): 6, (32, 2): 4, (128, 2): 4}


@pytest.fixture(scope="module")
def small():
    """A hollow model of two layers; its head is its embedding, of a hundred tokens."""
    return build_small(tie_word_embeddings=True)


def build_small(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return build(LlamaConfig(**{**sizes, "vocab_size": 100, "num_hidden_layers": 2, **changes}), rank=2)


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
    # attention's output too, which on a CPU only torch's attention keeps
    assert (on_cuda["activations"] > parts["activations"]) == attends_in(torch.bfloat16)


def test_offloaded_inputs_of_layers_leave_a_card_but_for_one(small):
    def parts(device, offload):
        return plan_memory(small, BATCH, settings(device, every_n_layers=1, offload=offload)).parts

    usual, offloaded = parts("cuda", False), parts("cuda", True)
    one = BATCH.computed * 64 * 2  # of two layers, in bfloat16
    assert usual["activations"] - offloaded["activations"] == 2 * one
    assert offloaded["workspace"] in (usual["workspace"], usual["workspace"] + one)
    assert parts("cpu", True) == parts("cpu", False)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, 8 * TRAINED + 4 * 28),  # two averages, and a count for each tensor
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

    untied, ids = build_small(vocab_size=4096), np.array([0, 1, 1, 600], dtype=np.int32)
    # 64 KiB around an address are mapped: 512 rows of 64 numbers, of which there are eight
    assert base(untied) - base(untied, ids) == 6 * 65_536
    assert base(untied, ids, "cuda") == base(untied)
    assert base(small, ids[:3]) == base(small)  # the head reads all of one that it shares


# ---- the same model without its numbers ------------------------------------------------------------------------------


def describe(model):
    """What memory depends on: tensors that train, and parts by name."""
    trained = {name: (tensor.shape, tensor.dtype) for name, tensor in trainable_tensors(model).items()}
    parts = {name: (type(module), runs_fused(module)) for name, module in model.named_modules()}
    return trained, {name: part for name, part in parts.items() if "lora_" not in name}, read_base(model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantization": "int8", "fast": False},
        {"quantization": "none"},
        {"dropout": 0.1, "layers": "last:1"},
        {"target_modules": ["q_proj", "down_proj"], "lora_options": {"use_dora": True}},
        {"lora_options": {"trainable_token_indices": [3], "rank_pattern": {"q_proj": 6}}},
    ],
    ids=str,
)
def test_a_hollow_model_is_the_model_without_its_numbers(tiny_base, options):
    module = steps.make_module(tiny_base, compute_dtype="bf16", **options)
    module.model.train()
    module.choose_layers()
    trained, parts, base = describe(module.model)
    for name, (kind, fused) in parts.items():
        parts[name] = (bnb.nn.Linear8bitLt if issubclass(kind, bnb.nn.Linear8bitLt) else kind), fused
    copied = meta_copy(module.model, torch.bfloat16, module.quantization, module.fast)
    for hollow in (build(tiny_base, **options), copied):
        assert all(parameter.is_meta for parameter in hollow.parameters())
        assert describe(hollow) == (trained, parts, base)


def test_an_adapter_folder_brings_its_own_shape(tiny_base, tmp_path):
    made = steps.make_module(tiny_base, rank=3, target_modules="attention")
    made.save_adapter(tmp_path / "adapter")
    assert count_trained(build(tiny_base, folder=tmp_path / "adapter")) == count_trained(made.model)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_llama_has_its_known_sizes():
    config = json.loads((ROOT / "configs/shapes/llama-3.1-8b/config.json").read_text())
    model = build(LlamaConfig(**config), rank=16)
    base = read_base(model)
    assert base.parameters == 8_030_261_248  # as its model card says: 8.03 billion
    rounded = {storage: round(base.count_bytes(storage) / 1e9, 2) for storage in STORAGES}
    assert rounded == {"fp32": 32.12, "bf16": 16.06, "int8": 9.09, "nf4": 6.03, "nf4, double quantized": 5.70}
    assert count_trained(model) == 41_943_040  # rank 16 on all linears, as PEFT prints it


EMBEDDING = 49_152 * 64  # tied: counted once
LINEARS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # layers × (q and o, k and v, the three of the MLP)
NORMS = 5 * 64
BASE = EMBEDDING + LINEARS + NORMS
ADAPTER = 2 * 8 * 1024  # layers × rank × (in + out) of the seven linears
# a scale for 64 weights: in 4 bytes, or in one byte and for each linear 4 bytes more (all have up to 256 scales)
SCALES, DOUBLE_SCALES = 4 * LINEARS // 64, LINEARS // 64 + 4 * 14


@pytest.mark.parametrize(
    ("quantization", "double_quant", "storage", "of_base"),
    [
        ("nf4", True, "nf4, double quantized", {"nf4": LINEARS // 2 + DOUBLE_SCALES}),
        ("fp4", False, "nf4", {"fp4": LINEARS // 2 + SCALES}),
        ("int8", True, "int8", {"int8": LINEARS}),
        ("none", True, "bf16", {"bfloat16": 2 * LINEARS}),
    ],
)
def test_a_loaded_base_takes_the_bytes_that_are_shown_and_planned(
    tiny_base, quantization, double_quant, storage, of_base
):
    model = load_base(str(tiny_base), quantization=quantization, double_quant=double_quant).model
    sizes = dict(Counter({"bfloat16": 2 * (EMBEDDING + NORMS)}) + Counter(of_base))
    assert count_parameters(model) == (0, BASE)  # the numbers that packed weights stand for
    assert bytes_by_dtype(model) == sizes
    assert name_storage(quantization, double_quant, number_bytes=2) == storage
    scales_of_rows = 4 * 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64) if quantization == "int8" else 0  # no parameters
    assert read_base(meta_base(tiny_base)).count_bytes(storage) == sum(sizes.values()) + scales_of_rows
    adapted = add_adapters(model)
    assert count_parameters(adapted) == (ADAPTER, BASE + ADAPTER)
    assert bytes_by_dtype(adapted) == {**sizes, "float32": 4 * ADAPTER}
    assert describe_sizes(adapted).startswith(f"16,384 of {BASE + ADAPTER:,} parameters train (0.51%); in memory: bfl")


def test_the_table_lists_adapted_modules_by_kind_and_shape_and_what_trains_beside(tiny_base):
    options = {"rank_pattern": {"layers.0.self_attn.v_proj": 2}, "trainable_token_indices": [5, 6]}
    targets = ["q_proj", "v_proj", "down_proj"]
    table = adapter_table(add_adapters(meta_base(tiny_base), target_modules=targets, lora_options=options))
    assert sorted(zip(*(column.cells for column in table.columns), strict=True)) == [
        ("down_proj", "2", "8 × 128", "64 × 8", "3,072"),
        ("q_proj", "2", "8 × 64", "64 × 8", "2,048"),
        ("trained beside", "", "", "", "128"),
        ("v_proj", "1", "2 × 64", "32 × 2", "192"),
        ("v_proj", "1", "8 × 64", "32 × 8", "768"),
    ]
