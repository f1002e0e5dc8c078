"""What a step takes by the formula: by hand, beside what real steps keep, and by a model without numbers."""

from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig

from qlora_lightning.model.adapters.lora import add_adapters, count_parameters
from qlora_lightning.model.layers.fuse import fuse_layers
from qlora_lightning.model.load.base_model import load_base
from qlora_lightning.model.load.build import meta_base, put_adapters
from qlora_lightning.model.memory.formula import build_step_memory
from qlora_lightning.support.versions import enable_activation_checkpointing
from tests import steps


def build(config, quantization="nf4", dtype=torch.bfloat16, **options):
    model = put_adapters(meta_base(config, dtype, quantization), None, **{"rank": 4, **options}).to("meta")
    fuse_layers(model)
    return model


# ---- beside real steps -----------------------------------------------------------------------------------------------

LENGTHS = (161, 97, 129)


def count_kept(module, batch):
    """Return the bytes that autograd keeps for backward, but for weights."""
    kept = set()

    def keep(tensor):
        kept.add(tensor.untyped_storage())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        module.compute_loss(batch)
    weights = {each.untyped_storage() for each in (*module.parameters(), *module.buffers())}
    return sum(each.nbytes() for each in kept - weights)


@pytest.mark.parametrize(
    ("options", "every_n_layers", "tolerance"),
    [
        ({}, 0, 0.03),
        ({"compute_dtype": "fp32", "quantization": "none"}, 0, 0.03),
        ({}, 1, 0.1),
        ({"dropout": 0.1}, 0, 0.15),  # from here on PEFT's layers; masks of a CPU are wider
        ({"lora_options": {"use_dora": True}}, 0, 0.1),
    ],
    ids=str,
)
def test_a_step_keeps_the_activations_that_are_planned(tiny_base, options, every_n_layers, tolerance):
    options = {"compute_dtype": "bf16"} | options
    module = steps.make_module(tiny_base, **options)
    if every_n_layers:
        enable_activation_checkpointing(module.causal_lm, every_n_layers)
    batch = steps.make_batch(LENGTHS, vocabulary=40_000)
    dtype = getattr(torch, module.identity["compute_dtype"])
    del options["compute_dtype"]
    step = replace(build_step_memory(build(tiny_base, dtype=dtype, **options), dtype), every_n_layers=every_n_layers)
    planned = step.parts(sum(LENGTHS), max(LENGTHS))["activations"]
    assert planned == pytest.approx(count_kept(module, batch), rel=tolerance)


# ---- by hand ---------------------------------------------------------------------------------------------------------

# Two layers 64 wide, 4 heads over 2 of width 16, an MLP 128 wide, 100 tokens; A and B of rank 2 of seven linears
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 100, "num_hidden_layers": 2}
LINEARS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
TRAINED = 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
# inputs of two norms, queries and output, keys and values, gate and up, seven x A; two norms and four heads in float32
SAVED = 2 * (2 * 64 + 2 * 64 + 2 * 32 + 2 * 128 + 7 * 2) + 4 * (2 + 4)


@pytest.fixture(scope="module")
def small():
    return build_step_memory(build(LlamaConfig(**SMALL, tie_word_embeddings=True), rank=2), torch.bfloat16)


def test_every_part_is_counted_as_on_paper(small):
    tokens = 300
    head = tokens * (4 * 64 + 4 + 2 * 64 + 8)
    assert small.parts(tokens, 100) == {
        "base": LINEARS // 2 + 2 * 5 * 64,
        "scales": 4 * LINEARS // 64,
        "vocabulary": 2 * 100 * 64,
        "gathered": 0,
        "adapters": 4 * TRAINED,
        "gradients": 4 * TRAINED,
        "optimizer": 8 * TRAINED,
        "copies": 2 * TRAINED,
        "activations": head + 2 * tokens * SAVED,
        # a layer's: the gradient of its output, four as wide as the MLP, and a dense weight; the head's takes less
        "workspace": tokens * (2 * 64 + 4 * 2 * 128) + 2 * 64 * 128,
        "context": 600_000_000,
    }


# ---- bytes -----------------------------------------------------------------------------------------------------------

EMBEDDING = 49_152 * 64  # tied: counted once
NORMS = 5 * 64
BASE = EMBEDDING + LINEARS + NORMS
ADAPTER = 2 * 8 * 1024  # layers × rank × (in + out) of the seven linears
# a scale for 64 weights: in 4 bytes, or in one byte and for each linear 4 bytes more (all have up to 256 scales)
SCALES, DOUBLE_SCALES = 4 * LINEARS // 64, LINEARS // 64 + 4 * 14


def count_bytes(model):
    """The bytes of all parameters, the scales of 4-bit weights included."""
    states = [each.weight.quant_state for each in model.modules() if isinstance(each, bnb.nn.Linear4bit)]
    scales = [state.absmax for state in states] + [state.state2.absmax for state in states if state.nested]
    return sum(each.nbytes for each in (*model.parameters(), *scales))


@pytest.mark.parametrize(
    ("quantization", "double_quant", "linears"),
    [
        ("nf4", True, LINEARS // 2 + DOUBLE_SCALES),
        ("fp4", False, LINEARS // 2 + SCALES),
        ("int8", True, LINEARS),
        ("none", True, 2 * LINEARS),
    ],
)
def test_a_loaded_base_takes_the_bytes_that_are_planned(tiny_base, quantization, double_quant, linears):
    model = load_base(str(tiny_base), quantization=quantization, double_quant=double_quant).model
    assert count_parameters(model) == (0, BASE)  # the numbers that packed weights stand for
    assert count_bytes(model) == linears + 2 * (EMBEDDING + NORMS)
    fixed = build_step_memory(
        build(tiny_base, quantization), torch.bfloat16, double_quant=double_quant, device_bytes=0
    ).fixed
    planned = sum(fixed[part] for part in ("base", "scales", "vocabulary"))
    assert planned == pytest.approx(count_bytes(model), rel=1e-4)
    adapted = add_adapters(model)
    assert count_parameters(adapted) == (ADAPTER, BASE + ADAPTER)
