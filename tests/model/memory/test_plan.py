import dataclasses

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from qlora_lightning.model.batch import BatchShape
from qlora_lightning.model.build import build_skeleton
from qlora_lightning.model.memory.plan import PARTS, StepSettings, count_optimizer_bytes, plan_memory, share_unread
from qlora_lightning.model.memory.shapes import BaseShape, checkpoint_layers, read_model

BATCH = BatchShape((40, 24), labelled=32)
# A and B of rank 2 of seven linears in two layers: 64 → 64, 32, 32, 64; 64 → 128 twice; 128 → 64
TRAINED = 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


@pytest.fixture(scope="module")
def model(tiny_base):
    settings = {"compute_dtype": torch.bfloat16, "quantization": "nf4", "adapter": None, "fast": True}
    return read_model(build_skeleton(LlamaConfig.from_pretrained(tiny_base), adapter_options={"rank": 2}, **settings))


def settings(**changes):
    usual = {"storage": "nf4", "number_bytes": 2, "optimizer": None, "device": "cpu"}
    return StepSettings(**{**usual, "process": 1000, **changes})


def test_every_part_is_there_and_they_add_up(model):
    plan = plan_memory(model, BATCH, settings())
    assert list(plan.parts) == list(PARTS)
    assert plan.peak_bytes == sum(plan.parts.values())
    assert plan.parts["base"] == model.base.count_bytes("nf4")
    assert plan.parts["adapters"] == plan.parts["gradients"] == 4 * TRAINED
    assert plan.parts["process"] == 1000
    assert plan.parts["logits"] == 32 * model.vocabulary * 2
    assert plan.parts["workspace"] > 0


def test_more_tokens_take_more_and_checkpoints_less(model):
    usual = plan_memory(model, BATCH, settings()).parts
    double = plan_memory(model, BatchShape((40, 24) * 2, 64), settings()).parts
    assert double["activations"] == 2 * usual["activations"]
    assert plan_memory(checkpoint_layers(model, 1), BATCH, settings()).parts["activations"] < usual["activations"] / 2


def test_adamw_has_two_averages_and_a_count_for_each_tensor(model):
    assert count_optimizer_bytes(model.trained(), None) == 8 * TRAINED + 4 * 2 * 2 * 7


def test_other_optimizers_are_asked(model):
    assert count_optimizer_bytes(model.trained(), "torch.optim.AdamW") == count_optimizer_bytes(model.trained(), None)
    assert count_optimizer_bytes(model.trained(), "torch.optim.SGD") == 0
    momentum = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    assert count_optimizer_bytes(model.trained(), momentum) == 4 * TRAINED


def test_eight_bit_averages_take_a_quarter():
    # a scale for each 256 numbers; tensors under 4,096 numbers stay in float32
    shapes = {(64, 1024): 3, (16, 16): 1}
    eight = 3 * 2 * (65_536 + 4 * 256) + 8 * 256
    assert count_optimizer_bytes(shapes, "bitsandbytes.optim.AdamW8bit") == eight
    assert count_optimizer_bytes(shapes, "bitsandbytes.optim.PagedAdamW8bit") == eight


@pytest.mark.parametrize("shape", [(64, 1024), (16, 16), (7, 640)])
def test_eight_bit_averages_are_as_large_as_those_of_bitsandbytes(shape):
    choice = "bitsandbytes.optim.AdamW8bit"
    asked = count_optimizer_bytes({shape: 1}, {"class_path": choice, "init_args": {}})
    assert count_optimizer_bytes({shape: 1}, choice) == asked


def test_a_cpu_keeps_kernels_for_each_length_of_a_batch_up_to_a_number(model):
    one, two, many, more = (
        plan_memory(model, BATCH, settings(batch_lengths=count)).parts["kernels"] for count in (1, 2, 25, 1000)
    )
    assert 0 < one < two < many == more
    assert many - one == 24 * (two - one)
    in_fp32, of_many = (
        plan_memory(model, BATCH, settings(number_bytes=4, batch_lengths=count)).parts["kernels"] for count in (1, 25)
    )
    assert in_fp32 == of_many  # its products make no kernels
    checkpointed = plan_memory(checkpoint_layers(model, 1), BATCH, settings(number_bytes=4)).parts["kernels"]
    assert checkpointed == in_fp32 + 2 * 64 * 128 * 4  # a hole for each layer, as large as its largest weight
    assert plan_memory(model, BATCH, settings(device="cuda")).parts["kernels"] == 0


def test_of_a_mapped_embedding_only_what_tokens_read_lies_in_memory(model):
    base = BaseShape(weights=(), others=64_000_000, embedding=(1000, 32_768))  # a row in bf16 is as much as is mapped
    ids = np.array([0, 1, 1, 999], dtype=np.int32)
    assert share_unread(ids, base, number_bytes=2) == pytest.approx(0.997)
    narrow = BaseShape(weights=(), others=64_000, embedding=(64, 1024))  # 32 rows are
    assert share_unread(np.array([0, 31], dtype=np.int32), narrow, number_bytes=2) == 0.5
    assert share_unread(ids, BaseShape((), 10), number_bytes=2) == 0.0  # the head reads all of one that it shares
    untied = dataclasses.replace(model, base=dataclasses.replace(model.base, embedding=(100, 64)))
    whole, half = (plan_memory(untied, BATCH, settings(unread=share)).parts["base"] for share in (0.0, 0.5))
    assert whole - half == 50 * 64 * 2
    on_cuda = plan_memory(untied, BATCH, settings(unread=0.5, device="cuda"))
    assert on_cuda.parts["base"] == whole
