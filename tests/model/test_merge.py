"""An adapter merged into its base, tensor by tensor, computes what base and adapter do; and how far models differ."""

import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_lightning import load_base
from qlora_lightning.cli import main
from qlora_lightning.commands.merge import compare_logits
from qlora_lightning.model.merge import TrainedWeights
from qlora_lightning.sources.folders import open_base
from tests.adapters import make_run
from tests.random_base import save_family

LINEAR = "model.layers.1.mlp.down_proj"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def test_an_int8_weight_is_that_which_a_loaded_base_computes_with(tiny_base, cache):
    options = {"quantization": "int8", "compute_dtype": torch.bfloat16, "cache": False}
    weight = load_base(str(tiny_base), **options).model.get_submodule(LINEAR).weight
    weights = TrainedWeights(open_base(str(tiny_base)), "int8", True, torch.bfloat16)
    assert torch.equal(weights(f"{LINEAR}.weight"), weight.data.float() * (weight.SCB.unsqueeze(1) / 127))


PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3.0}}
VARIANTS = {
    "fp4": {"quantization": "fp4", "double_quant": False},
    "patterns": {"lora_options": PATTERNS},
    "dora": {"lora_options": {"use_dora": True}},
    "tokens and norms": {"lora_options": {"trainable_token_indices": [5, 6], "modules_to_save": ["norm"]}},
    "embedding": {"lora_options": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}},
    "untied": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_folder_computes_what_base_and_adapter_do(tiny_base, tmp_path, variant):
    base = tiny_base
    if variant == "untied":  # with a head of its own
        base = shutil.copytree(tiny_base, tmp_path / "base")
        config = LlamaConfig.from_pretrained(tiny_base, tie_word_embeddings=False)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    model = make_run(tmp_path / "run", base, **VARIANTS[variant])
    merge = ["merge", "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]
    assert main([*merge, "--dtype", "fp32", "--rows", "0"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (logits(model) - logits(merged)).abs().max() > 0.01  # the adapter does something


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_linear_whose_weight_is_transposed_is_merged(tiny_base, tmp_path, quantization):
    base = save_family(tmp_path / "base", "gpt2", tiny_base)
    model = make_run(tmp_path / "run", base, quantization=quantization, target_modules=["c_attn", "c_proj"])
    merge = ["merge", "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]
    assert main([*merge, "--dtype", "fp32", "--rows", "0"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(model)).norm() < 0.02 * logits(model).norm()  # int8 rounds states too


def test_loss_divergence_and_share_of_equal_tokens_are_those_computed_by_hand():
    even, skew = [0.0, 0.0], [math.log(3), 0.0]  # probabilities 1/2, 1/2 and 3/4, 1/4
    reference, labels = torch.tensor([skew, even]), torch.tensor([0, 1])
    found = compare_logits(reference, torch.tensor([even, [0.0, math.log(3)]]), labels)
    kl = [3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2), 1 / 2 * math.log(2 / 1) + 1 / 2 * math.log(2 / 3)]
    loss = (-math.log(1 / 2) - math.log(3 / 4)) / 2
    # of equal logits the first counts as the top
    assert found == pytest.approx({"loss": loss, "kl": sum(kl) / 2, "top1": 0.5})
    assert math.isnan(compare_logits(reference, torch.tensor([[math.nan, 0.0], even]), labels)["kl"])
