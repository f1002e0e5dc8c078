"""An adapter merged into its base, tensor by tensor, computes what base and adapter do; and how far models differ."""

import math
import shutil

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from qlora_lightning.base import open_base
from qlora_lightning.base.folder import TensorFiles
from qlora_lightning.model.load.base_model import load_base
from qlora_lightning.model.merge import MergedWeights, TrainedWeights, compare_logits, plan_merge
from tests.adapters import make_adapter

LINEAR = "model.layers.1.mlp.down_proj"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def dense(module):
    """What a loaded layer multiplies with, in fp32."""
    if isinstance(module, bnb.nn.Linear4bit):
        module.weight.quant_state.dtype = torch.float32
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        return module.weight.data.float() * (module.weight.SCB.unsqueeze(1) / 127)
    return module.weight.float()


@pytest.mark.parametrize(
    ("quantization", "double_quant", "dtype", "cache"),
    [
        ("nf4", True, torch.bfloat16, True),
        ("fp4", False, torch.float32, False),  # quantized again
        ("int8", True, torch.bfloat16, True),
        ("int8", True, torch.bfloat16, False),
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
    assert torch.equal(own, dense(model.get_submodule(LINEAR)))
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(weights(name), model.get_parameter(name).data)
    original = TensorFiles(tiny_base, "tiny").read(f"{LINEAR}.weight")
    assert 0 < (own - original).norm() / original.norm() < 0.2


def test_a_base_that_is_stored_quantized_gives_what_it_stores(tiny_base, tmp_path):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=settings)
    model.save_pretrained(tmp_path / "stored")
    weights = TrainedWeights(open_base(str(tmp_path / "stored")), "nf4", False, torch.float32)
    assert torch.equal(weights(f"{LINEAR}.weight"), dense(model.get_submodule(LINEAR)))


VARIANTS = {
    "patterns": {
        "lora_options": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3.0}}
    },
    "dora": {"lora_options": {"use_dora": True}},
    "tokens": {"lora_options": {"trainable_token_indices": [5, 6]}},
    "norm": {"lora_options": {"modules_to_save": ["norm"]}},
    "embedding": {"lora_options": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}},
    "untied": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_of_merged_weights_computes_what_base_and_adapter_do(tiny_base, tmp_path, variant):
    base = tiny_base
    if variant == "untied":  # with a head of its own
        base = shutil.copytree(tiny_base, tmp_path / "base")
        torch.manual_seed(1)
        config = LlamaConfig.from_pretrained(tiny_base, tie_word_embeddings=False)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    model = make_adapter(tmp_path / "adapter", base, **VARIANTS[variant])
    plan = plan_merge(base, tmp_path / "adapter")
    weights = TrainedWeights(open_base(str(base)), "nf4", True, torch.float32)
    merged, whole = MergedWeights(plan, weights), AutoModelForCausalLM.from_pretrained(base)
    assert list(plan.shapes) == [name for name, _ in whole.named_parameters()]
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(merged(name))
    torch.testing.assert_close(logits(whole.eval()), logits(model), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (logits(model) - logits(whole)).abs().max() > 0.01  # the adapter does something
    assert all(parameter.is_meta for name, parameter in plan.model.named_parameters() if "base_layer" in name)


def test_loss_divergence_and_share_of_equal_tokens_are_those_computed_by_hand():
    even, skew = [0.0, 0.0], [math.log(3), 0.0]  # probabilities 1/2, 1/2 and 3/4, 1/4
    reference, labels = torch.tensor([skew, even]), torch.tensor([0, 1])
    found = compare_logits(reference, torch.tensor([even, [0.0, math.log(3)]]), labels)
    kl = [3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2), 1 / 2 * math.log(2 / 1) + 1 / 2 * math.log(2 / 3)]
    loss = (-math.log(1 / 2) - math.log(3 / 4)) / 2
    # of equal logits the first counts as the top
    assert found._asdict() == pytest.approx({"loss": loss, "kl": sum(kl) / 2, "top1": 0.5})
    assert math.isnan(compare_logits(reference, torch.tensor([[math.nan, 0.0], even]), labels).kl)
