"""Norms and effective ranks of updates equal those of the dense ΔW."""

import copy
import math

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lightning.base import open_base
from qlora_lightning.model.adapters.lora import add_adapters
from qlora_lightning.model.adapters.targets import layer_of
from qlora_lightning.model.adapters.update_norms import measure_updates
from qlora_lightning.model.weights.base import TrainedWeights, name_in_base
from qlora_lightning.model.weights.merging import MergedWeights, plan_merge
from tests.adapters import make_adapter


@pytest.mark.parametrize(
    ("quantization", "options"),
    [
        ("nf4", {}),
        ("int8", {}),
        ("nf4", {"lora_options": {"use_dora": True}, "layers": [1]}),
        ("none", {"lora_options": {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, "target_modules": "attention"}),
    ],
)
def test_each_update_is_measured_as_the_dense_difference_of_the_merged_weight(
    tiny_base, tmp_path, quantization, options
):
    model = make_adapter(tmp_path / "adapter", tiny_base, quantization, **options)
    table = measure_updates(model)
    weights = TrainedWeights(open_base(str(tiny_base)), quantization, True, torch.float32)
    merged = MergedWeights(plan_merge(tiny_base, tmp_path / "adapter"), weights)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert sum(map(len, table.values())) == len(layers)
    for name, layer in layers.items():
        found = table[name.rpartition(".")[2]][layer_of(name)]
        weight = f"{name_in_base(name).removeprefix('base_model.model.')}.weight"
        before = weights(weight)
        assert found.ratio == pytest.approx(float((merged(weight) - before).norm() / before.norm()), rel=1e-4)
        shares = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double())[: found.rank]
        shares /= shares.sum()
        assert found.effective_rank == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-4)
        assert found.rank == (2 if "rank_pattern" in str(options) and "q_proj" in name else 4)


@pytest.mark.parametrize("use_dora", [True, False])
def test_embedding_and_head_are_measured_as_well(use_dora):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=False, **sizes))
    before = copy.deepcopy(base)
    options = {"init_lora_weights": False, "use_dora": use_dora}
    model = add_adapters(base, target_modules=["embed_tokens", "lm_head"], lora_options=options)
    table = measure_updates(model)
    merged = model.merge_and_unload()
    for name in ("model.embed_tokens", "lm_head"):
        weight = before.get_submodule(name).weight
        ratio = (merged.get_submodule(name).weight - weight).norm() / weight.norm()
        assert table[name.removeprefix("model.")][None].ratio == pytest.approx(ratio.item(), rel=1e-4)


def test_equal_directions_count_as_so_many_and_an_untrained_adapter_as_none(tiny_base, tmp_path):
    model = make_adapter(tmp_path / "adapter", tiny_base, target_modules=["q_proj"], layers=[1], std=0.0)
    found = measure_updates(model)["q_proj"][1]
    assert (found.ratio, found.rank, found.effective_rank) == (0.0, 4, 0.0)
    layer = next(each for each in model.modules() if isinstance(each, LoraLayer))
    a, b = layer.lora_A["default"].weight.data.zero_(), layer.lora_B["default"].weight.data
    a[0, 3] = a[1, 5] = b[7, 0] = b[9, 1] = 3.0
    assert measure_updates(model)["q_proj"][1].effective_rank == pytest.approx(2.0)
