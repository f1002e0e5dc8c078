import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lightning.base import open_base
from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.weights.base import OriginalWeights, TrainedWeights, make_skeleton, quantized_names

LINEAR = "model.layers.1.mlp.down_proj"


def weights_of(folder, quantization, double_quant, dtype):
    base = open_base(str(folder))
    return TrainedWeights(base, quantized_names(make_skeleton(folder)), quantization, double_quant, dtype)


def dense(module):
    """What a loaded layer multiplies with, in fp32."""
    if isinstance(module, bnb.nn.Linear4bit):
        module.weight.quant_state.dtype = torch.float32
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        return module.weight.data.float() * (module.weight.SCB.unsqueeze(1) / 127)
    return module.weight.float()


@pytest.mark.parametrize(
    ("quantization", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True), ("none", True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_that_a_loaded_base_computes_with(tiny_base, quantization, double_quant, dtype):
    weights = weights_of(tiny_base, quantization, double_quant, dtype)
    model = load_base(
        str(tiny_base), quantization=quantization, double_quant=double_quant, compute_dtype=dtype, cache=False
    ).model
    own = weights(f"{LINEAR}.weight")
    assert own.dtype == torch.float32
    assert torch.equal(own, dense(model.get_submodule(LINEAR)))
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
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
    weights = weights_of(tmp_path / "stored", kind, False, torch.float32)
    assert torch.equal(weights(f"{LINEAR}.weight"), dense(model.get_submodule(LINEAR)))


def test_only_linears_of_the_decoder_layers_are_quantized(tiny_base):
    names = quantized_names(make_skeleton(tiny_base))
    assert len(names) == 2 * 7
    assert all(".layers." in name for name in names)
