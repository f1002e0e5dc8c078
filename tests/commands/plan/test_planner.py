from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from qlora_lightning.commands.plan.planner import Choice, Planner
from qlora_lightning.model.build import build_skeleton
from qlora_lightning.model.memory.shapes import checkpoint_layers, read_model

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    vocab_size=50,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=5,
)
CHOICE = Choice(
    quantization="nf4",
    double_quant=True,
    optimizer=None,
    adapter=None,
    adapter_options={"rank": 4, "layers": "all", "lora_options": None},
    fast=True,
    has_noise=False,
    every_n_layers=2,
    is_mapped=True,
)


@pytest.mark.parametrize(("options", "built"), [({}, 2), ({"layers": "last:2"}, 5), ({"layers": "last:5"}, 5)], ids=str)
def test_a_shape_is_that_of_all_layers_however_many_were_built(options, built):
    choice = replace(CHOICE, adapter_options={**CHOICE.adapter_options, **options})
    planner = Planner(CONFIG, "cpu", "bf16", 0)
    settings = {"compute_dtype": torch.bfloat16, "quantization": "nf4", "fast": True, "adapter": None}
    whole = read_model(build_skeleton(CONFIG, adapter_options=choice.adapter_options, **settings))
    assert planner.shape(choice) == checkpoint_layers(whole, 2)
    assert len(planner.model(choice).get_base_model().model.layers) == built
