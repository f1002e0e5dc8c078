"""What a step takes by the formula: by hand, beside what real steps keep, and by a model without numbers."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from qlora_lightning.model.activation_checkpointing import Checkpointing, enable_activation_checkpointing
from qlora_lightning.model.cpu.library import find_function
from qlora_lightning.model.layers.select import fuse_layers
from qlora_lightning.model.load.build import meta_base, put_adapters
from qlora_lightning.model.memory.formula import build_step_memory
from qlora_lightning.model.model_types import RECURRENT_TYPES
from tests import families, steps


def build(config, quantization="nf4", dtype=torch.bfloat16, **options):
    if not isinstance(config, PreTrainedConfig):
        config = LlamaConfig.from_pretrained(config)
    model = put_adapters(meta_base(config, dtype, quantization), None, **{"rank": 4, **options}).to("meta")
    fuse_layers(model)
    return model


# ---- beside real steps -----------------------------------------------------------------------------------------------

LENGTHS = (161, 97, 129)
COMPUTES = "bf16" if find_function("attend", torch.bfloat16) else "fp32"  # where attention keeps what a GPU's keeps


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
    ("options", "checkpointed", "least", "most"),
    [
        ({}, False, 0.97, 1.03),
        ({"compute_dtype": "fp32", "quantization": "none"}, False, 0.97, 1.03),
        ({}, True, 0.9, 1.1),
        ({"dropout": 0.1}, False, 0.4, 1.0),  # from here on PEFT's layers, and an estimate, rather too high
        pytest.param({"lora_options": {"use_dora": True}}, False, 0.4, 1.0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_keeps_the_activations_that_are_planned(tiny_base, options, checkpointed, least, most):
    options = {"compute_dtype": COMPUTES} | options
    module = steps.make_module(tiny_base, **options)
    if checkpointed:
        enable_activation_checkpointing(module.causal_lm)
    batch = steps.make_batch(LENGTHS, vocabulary=40_000)
    dtype = getattr(torch, module.identity["compute_dtype"])
    del options["compute_dtype"]
    step = build_step_memory(build(tiny_base, dtype=dtype, **options), dtype)
    planned = step.parts(sum(LENGTHS), Checkpointing(checkpointed))["activations"]
    # the head: the last norm keeps float32 states on a CPU; of the loss each state's gradient and index
    head = sum(LENGTHS) * ((4 + dtype.itemsize) * 64 + 4 + 8)
    assert least <= count_kept(module, batch) / (planned + head) <= most


RECURRENT = [each if each == "lfm2" else pytest.param(each, marks=pytest.mark.slow) for each in RECURRENT_TYPES]


@pytest.mark.parametrize("model_type", RECURRENT)
def test_what_mixers_keep_is_planned_generously(model_type, tmp_path):
    families.save_random(tmp_path, model_type)
    module, batch = steps.make_module(tmp_path, quantization="none"), steps.make_batch(LENGTHS)
    step = build_step_memory(build(AutoConfig.from_pretrained(tmp_path), "none", torch.float32), torch.float32)
    assert 0.3 <= count_kept(module, batch) / step.parts(sum(LENGTHS), Checkpointing())["activations"] <= 1.0


# ---- by hand ---------------------------------------------------------------------------------------------------------

# Two layers 64 wide, 4 heads over 2 of width 16, an MLP 128 wide, 100 tokens; A and B of rank 2 of seven linears
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 100, "num_hidden_layers": 2}
LINEARS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
TRAINED = 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
# inputs of two norms, queries and output, keys and values, gate and up, seven x A; two norms and four heads in float32
SAVED = 2 * (2 * 64 + 2 * 64 + 2 * 32 + 2 * 128 + 7 * 2) + 4 * (2 + 4)


def test_every_part_is_counted_as_on_paper():
    step = build_step_memory(build(LlamaConfig(**SMALL, tie_word_embeddings=True), rank=2), torch.bfloat16)
    tokens, buffers = 300, 2 * 32 * 2**20 + round(0.03 * 18 * TRAINED)
    assert step.parts(tokens, Checkpointing()) == {
        "base": LINEARS // 2 + 2 * 5 * 64,
        "scales": LINEARS // 64 + 4 * (LINEARS // 64 // 256),  # bytes, and a float32 for 256 of them
        "vocabulary": 2 * 100 * 64,
        "gathered": 0,
        "adapters": 4 * TRAINED,
        "gradients": 4 * TRAINED,
        "optimizer": 8 * TRAINED,
        "copies": 2 * TRAINED,
        "buffers": buffers,
        "activations": 2 * tokens * SAVED,
        # the head's: three hidden states and the logits, and 1 kB of the batch; a layer's takes less
        "workspace": tokens * (3 * 2 * 64 + 2 * 100 + 1024),
        "context": 600_000_000,
    }
