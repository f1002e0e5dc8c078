"""Merged weights compute what base and adapter do; how far models differ."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_lightning.base import open_base
from qlora_lightning.model.build import meta_base
from qlora_lightning.model.weights.base import OriginalWeights, TrainedWeights
from qlora_lightning.model.weights.layerwise import Reference, run_layerwise
from qlora_lightning.model.weights.merging import MergedWeights, plan_merge
from qlora_lightning.support.errors import UserError
from tests.adapters import make_adapter
from tests.flat import collate

IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
VARIANTS = {
    "plain": {},
    "rslora": {"lora_options": {"use_rslora": True}},
    "patterns": {"lora_options": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3.0}}},
    "dora": {"lora_options": {"use_dora": True}},
    "tokens": {"lora_options": {"trainable_token_indices": [5, 6]}},
    "norm": {"lora_options": {"modules_to_save": ["norm"]}},
    "embedding": {"lora_options": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}},
    "last_layer": {"layers": [1], "target_modules": "attention"},
    "untied": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def untied_base(tiny_base, tmp_path_factory):
    """The tiny base with a head of its own."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("untied") / "base")
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(tiny_base, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def batches():
    samples = [(ids, [-100, *ids[1:]], number) for number, ids in enumerate(IDS)]
    return [collate(samples[0]), collate(*samples)]


def plain_logits(model):
    """The logits of the labelled tokens, by transformers' and PEFT's own forward, one row after the other."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([ids])).logits[0, :-1] for ids in IDS]
    return torch.cat([rows[0], rows[0], rows[1]])


def trained_weights(base):
    return TrainedWeights(open_base(str(base)), "nf4", True, torch.float32)


def assert_says(model, weights, expected):
    found = torch.cat(list(run_layerwise(model, weights, batches())))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_say_what_base_and_adapter_say(tiny_base, untied_base, tmp_path, variant):
    base = untied_base if variant == "untied" else tiny_base
    model = make_adapter(tmp_path / "adapter", base, **VARIANTS[variant])
    expected = plain_logits(model)
    plan, weights = plan_merge(base, tmp_path / "adapter"), trained_weights(base)
    merged = MergedWeights(plan, weights)
    assert_says(plan.model.get_base_model(), weights, expected)  # base and adapter, filled layer by layer
    assert_says(meta_base(base), merged, expected)
    whole = AutoModelForCausalLM.from_pretrained(base)  # and in a whole model of transformers
    assert list(plan.shapes) == [name for name, _ in whole.named_parameters()]
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(merged(name))
    torch.testing.assert_close(plain_logits(whole.eval()), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (plain_logits(model) - expected).abs().max() > 0.01  # the adapter does something
    assert all(parameter.is_meta for name, parameter in plan.model.named_parameters() if "base_layer" in name)


def test_what_no_adapter_touches_comes_as_it_is(tiny_base, tmp_path):
    make_adapter(tmp_path / "adapter", tiny_base, layers=[1])
    original = OriginalWeights(open_base(str(tiny_base)))
    merged = MergedWeights(plan_merge(tiny_base, tmp_path / "adapter"), original)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(merged(name.format(0)), original(name.format(0)))
    assert not torch.equal(merged(name.format(1)), original(name.format(1)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"bias": "lora_only"}, "sets 'bias'"),
    ],
)
def test_kinds_that_are_not_verified_are_refused_by_name(tiny_base, tmp_path, settings, words):
    make_adapter(tmp_path / "adapter", tiny_base)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(UserError, match=f"cannot be merged: .*{words}"):
        plan_merge(tiny_base, tmp_path / "adapter")


def test_an_adapter_that_is_too_large_to_merge_is_refused(tiny_base, tmp_path):
    make_adapter(tmp_path / "adapter", tiny_base)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    huge = {name: torch.full_like(tensor, 1e30) for name, tensor in tensors.items() if "layers.0.mlp.up_proj" in name}
    save_file({**tensors, **huge}, file, {"format": "pt"})
    merged = MergedWeights(plan_merge(tiny_base, tmp_path / "adapter"), trained_weights(tiny_base))
    with pytest.raises(UserError, match=r"cannot be merged into model\.layers\.0\.mlp\.up_proj"):
        merged("model.layers.0.mlp.up_proj.weight")


# ---- how far two models differ ---------------------------------------------------------------------------------------


def test_figures_are_those_computed_by_hand():
    even, skew = [0.0, 0.0], [math.log(3), 0.0]  # probabilities 1/2, 1/2 and 3/4, 1/4
    reference = Reference([torch.tensor([skew, even])], torch.tensor([0, 1]))
    assert reference.loss == pytest.approx((-math.log(3 / 4) - math.log(1 / 2)) / 2)
    found = reference.compare([torch.tensor([even, [0.0, math.log(3)]])])
    kl = [3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2), 1 / 2 * math.log(2 / 1) + 1 / 2 * math.log(2 / 3)]
    assert dataclasses.asdict(found) == pytest.approx(
        {
            "loss": (-math.log(1 / 2) - math.log(3 / 4)) / 2,
            "kl": sum(kl) / 2,
            "largest_kl": max(kl),
            "top1": 0.5,  # of equal logits the first counts as the top
            "mean_difference": math.log(3) / 2,
            "largest_difference": math.log(3),
        }
    )
    assert math.isnan(reference.compare([torch.tensor([[math.nan, 0.0], even])]).kl)
