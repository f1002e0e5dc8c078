"""A base's tensors, one at a time, are those that training computes with."""

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lightning.base import open_base
from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.weights.base import OriginalWeights, TrainedWeights

LINEAR = "model.layers.1.mlp.down_proj"


def dense(module):
    """What a loaded layer multiplies with, in fp32."""
    if isinstance(module, bnb.nn.Linear4bit):
        module.weight.quant_state.dtype = torch.float32
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        return module.weight.data.float() * (module.weight.SCB.unsqueeze(1) / 127)
    return module.weight.float()


@pytest.mark.parametrize("cache", [False, True], ids=["quantized again", "cached"])
@pytest.mark.parametrize(
    ("quantization", "double_quant", "dtype"),
    [
        ("nf4", True, torch.bfloat16),
        ("nf4", False, torch.float32),
        ("fp4", True, torch.float32),
        ("int8", True, torch.bfloat16),
        ("none", True, torch.bfloat16),
    ],
)
def test_weights_are_those_that_a_loaded_base_computes_with(
    tiny_base, tmp_path, monkeypatch, quantization, double_quant, dtype, cache
):
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path))
    options = {"quantization": quantization, "double_quant": double_quant, "compute_dtype": dtype}
    model = load_base(str(tiny_base), cache=cache, **options).model
    weights = TrainedWeights(open_base(str(tiny_base)), quantization, double_quant, dtype)
    own = weights(f"{LINEAR}.weight")
    assert own.dtype == torch.float32
    assert torch.equal(own, dense(model.get_submodule(LINEAR)))
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        assert weights(name).dtype == dtype
        assert torch.equal(weights(name), model.get_parameter(name).data)
    assert torch.equal(weights("lm_head.weight"), model.get_output_embeddings().weight.data)  # tied
    if quantization != "none":
        original = OriginalWeights(open_base(str(tiny_base)))(f"{LINEAR}.weight")
        assert 0 < (own - original).norm() / original.norm() < 0.2


@pytest.mark.parametrize("settings", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_base_that_is_stored_quantized_gives_what_it_stores(tiny_base, tmp_path, settings):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=BitsAndBytesConfig(**settings))
    model.save_pretrained(tmp_path / "stored")
    kind = "int8" if "load_in_8bit" in settings else "nf4"
    weights = TrainedWeights(open_base(str(tmp_path / "stored")), kind, False, torch.float32)
    assert torch.equal(weights(f"{LINEAR}.weight"), dense(model.get_submodule(LINEAR)))
