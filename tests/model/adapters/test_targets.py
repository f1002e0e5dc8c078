"""Which modules carry an adapter."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lightning.model.adapters.targets import compact_targets, resolve_targets
from qlora_lightning.support.errors import UserError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes))


@pytest.mark.parametrize(
    ("target_modules", "layers", "endings", "of_layers"),
    [
        ("all-linear", "all", ATTENTION + MLP, [0, 1, 2, 3]),
        ("attention", "all", ATTENTION, [0, 1, 2, 3]),
        ("mlp", "last:2", MLP, [2, 3]),
        (["q_proj", "v_proj"], [1, 0], ["q_proj", "v_proj"], [0, 1]),
        (["self_attn.q_proj"], "last:4", ["q_proj"], [0, 1, 2, 3]),
        ("q_proj", [2], ["q_proj"], [2]),
        (r".*\.(up|down)_proj", "all", ["up_proj", "down_proj"], [0, 1, 2, 3]),
        (r"model\.layers\.1\.mlp\..*", "all", MLP, [1]),
    ],
)
def test_presets_names_expressions_and_layers_select_these(llama, target_modules, layers, endings, of_layers):
    parts = {"self_attn": ATTENTION, "mlp": MLP}
    expected = [
        f"model.layers.{layer}.{part}.{name}"
        for layer in of_layers
        for part, names in parts.items()
        for name in names
        if name in endings
    ]
    assert resolve_targets(llama, target_modules, layers) == expected


def test_head_and_embedding_can_be_named_and_are_in_no_layer(llama):
    assert resolve_targets(llama, ["q_proj", "lm_head"], "last:1") == ["model.layers.3.self_attn.q_proj", "lm_head"]
    assert resolve_targets(llama, ["embed_tokens"]) == ["model.embed_tokens"]


@pytest.mark.parametrize(
    ("target_modules", "layers", "sentence"),
    [
        (["q_proj", "uproj"], "all", "names 'uproj', but the base has no such module.*Did you mean 'up_proj'"),
        ("al-linear", "all", "Did you mean 'all-linear'"),
        ("xyz", "all", "'xyz'.*it has embed_tokens, q_proj.*must match a full name such as model.layers.0"),
        ("q_(proj", "all", r"'q_\(proj' is not a regular expression"),
        ([], "all", "empty list"),
        ("all-linear", "first:2", "'first:2': expected all, last:N, or a list"),
        ("all-linear", "last:0", "has 4 layers: expected last:1 … last:4"),
        ("all-linear", "last:5", "has 4 layers"),
        *(("all-linear", layers, "has 4 layers: .* or a list of some of 0 … 3") for layers in ([0, 4], [-1], [])),
        (r"model\.layers\.0\..*_proj", [3], "together select no module"),
    ],
)
def test_what_selects_nothing_is_refused_with_the_nearest_name(llama, target_modules, layers, sentence):
    with pytest.raises(UserError, match=sentence):
        resolve_targets(llama, target_modules, layers)


def test_names_shorten_to_endings_only_if_these_select_the_same(llama):
    assert compact_targets(llama, resolve_targets(llama, "attention")) == sorted(ATTENTION)
    some = resolve_targets(llama, "attention", "last:2")
    assert compact_targets(llama, some) == some
    model = nn.ModuleDict({"one": nn.ModuleDict({"proj": nn.Linear(1, 1)}), "proj": nn.Linear(1, 1)})
    assert compact_targets(model, ["one.proj"]) == ["one.proj"]
    assert compact_targets(model, ["one.proj", "proj"]) == ["proj"]
