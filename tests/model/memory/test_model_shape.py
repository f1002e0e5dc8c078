import pytest
import torch
from transformers import LlamaConfig

from qlora_lightning.model.build import build_skeleton
from qlora_lightning.model.memory.shapes import read_model


@pytest.mark.parametrize(
    ("config", "options", "fused"),
    [
        ({}, {}, True),
        ({"hidden_act": "swish"}, {}, True),
        ({"hidden_act": "gelu"}, {}, False),
        ({"attention_dropout": 0.1}, {}, False),
        ({}, {"dropout": 0.1}, False),
    ],
)
def test_a_layer_counts_as_fused_where_it_would_run_so(config, options, fused):
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {"compute_dtype": torch.bfloat16, "quantization": "nf4", "adapter": None, "fast": True}
    model = build_skeleton(LlamaConfig(**sizes, **heads, **config), adapter_options=options, **settings)
    assert [layer.fused for layer in read_model(model).layers] == [fused] * 2
