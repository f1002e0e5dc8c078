import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lightning.model.adapters.targets import compact_targets, resolve_targets
from qlora_lightning.support.errors import UserError

LAYERS = 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama():
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=2
            )
        )


def endings(targets):
    return {name.rpartition(".")[2] for name in targets}


def layers_of(targets):
    return sorted({int(name.split(".")[2]) for name in targets})


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("all-linear", ATTENTION + MLP),
        ("attention", ATTENTION),
        ("mlp", MLP),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["self_attn.q_proj"], ["q_proj"]),
        ("q_proj", ["q_proj"]),
        (r".*\.(up|down)_proj", ["up_proj", "down_proj"]),
    ],
)
def test_presets_names_and_expressions_select_these_in_every_layer(llama, target_modules, expected):
    targets = resolve_targets(llama, target_modules)
    assert len(targets) == LAYERS * len(expected)
    assert endings(targets) == set(expected)


def test_names_are_whole_and_in_the_order_of_the_model(llama):
    assert resolve_targets(llama, ["v_proj", "q_proj"], [1, 0]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_head_and_embedding_are_no_linears_of_a_layer_but_can_be_named(llama):
    assert not {"lm_head", "embed_tokens"} & endings(resolve_targets(llama, "all-linear"))
    assert resolve_targets(llama, ["lm_head", "embed_tokens"]) == ["model.embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", [0, 1, 2, 3]), ("last:1", [3]), ("last:3", [1, 2, 3]), ("last:4", [0, 1, 2, 3]), ([2, 0, 2], [0, 2])],
)
def test_layers_choose_among_the_modules(llama, layers, expected):
    targets = resolve_targets(llama, "all-linear", layers)
    assert layers_of(targets) == expected
    assert len(targets) == 7 * len(expected)


def test_layers_leave_modules_outside_of_layers_alone(llama):
    targets = resolve_targets(llama, ["q_proj", "lm_head"], "last:1")
    assert targets == ["model.layers.3.self_attn.q_proj", "lm_head"]


@pytest.mark.parametrize(
    ("target_modules", "layers", "sentence"),
    [
        (["q_prj"], "all", r"names 'q_prj', but the base has no such module.*Did you mean 'q_proj'"),
        (["q_proj", "uproj"], "all", "names 'uproj'.*Did you mean 'up_proj'"),
        ("al-linear", "all", "Did you mean 'all-linear'.*Presets are all-linear, attention, mlp"),
        ("xyz", "all", "'xyz'.*it has embed_tokens, q_proj.*must match a full name such as model.layers.0"),
        ("q_(proj", "all", r"'q_\(proj' is not a regular expression"),
        ([], "all", "empty list"),
        ("all-linear", "first:2", "'first:2': expected all, last:N, or a list"),
        ("all-linear", "last:0", "has 4 layers: N must lie in 1 … 4"),
        ("all-linear", "last:5", "has 4 layers: N must lie in 1 … 4"),
        ("all-linear", [0, 4], r"\[0, 4\], but the base's layers are 0 … 3"),
        ("all-linear", [-1], "the base's layers are 0 … 3"),
        ("all-linear", [], "the base's layers are 0 … 3"),
        (r"model\.layers\.0\..*_proj", [3], "together select no module"),
    ],
)
def test_what_selects_nothing_is_refused_with_the_nearest_name(llama, target_modules, layers, sentence):
    with pytest.raises(UserError, match=sentence):
        resolve_targets(llama, target_modules, layers)


def test_targets_of_every_layer_shorten_to_endings(llama):
    assert compact_targets(llama, resolve_targets(llama, "attention")) == sorted(ATTENTION)


def test_targets_of_some_layers_stay_whole_names(llama):
    targets = resolve_targets(llama, "attention", "last:2")
    assert compact_targets(llama, targets) == targets


def test_an_ending_that_other_modules_share_is_not_used():
    model = nn.ModuleDict({"one": nn.ModuleDict({"proj": nn.Linear(1, 1)}), "proj": nn.Linear(1, 1)})
    assert compact_targets(model, ["one.proj"]) == ["one.proj"]
    assert compact_targets(model, ["one.proj", "proj"]) == ["proj"]
