from types import SimpleNamespace

import peft
import pytest
from transformers import AutoModelForCausalLM

from qlora_lightning.model.adapters.identity import (
    check_identity,
    data_differences,
    describe_adapter,
    hash_config,
    identity_of_data,
)
from qlora_lightning.model.adapters.lora import add_adapters
from qlora_lightning.support.errors import UserError

HASHES = ["0123456789abcdef" * 4, "fedcba9876543210" * 4]
OWN = {
    "base": "a",
    "fingerprint": HASHES[0],
    "config_hash": HASHES[0],
    "quantization": "nf4",
    "double_quant": True,
    "adapter": {"rank": 2, "alpha": 4, "target_modules": ["q_proj"], "layers": [0, 1], "lora_options": {}},
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": "b", "fingerprint": HASHES[1]}, ["b (weights fedcba987654) there", "a (weights 0123456789ab) here"]),
        (
            {"config_hash": HASHES[1]},
            ["config fedcba987654", "config 0123456789ab", "or by --base"],
        ),
        ({"quantization": "int8"}, ["model.quantization int8", "here it is nf4", "Set model.quantization to int8"]),
        ({"double_quant": False}, ["model.double_quant false", "here it is true"]),
        ({"adapter": {"rank": 3}}, ["model.rank 3, this model's has 2"]),
        ({"adapter": {"target_modules": ["q_proj", "v_proj"]}}, ['model.target_modules ["q_proj", "v_proj"]']),
        ({"adapter": {"layers": [1]}}, ["model.layers [1]", "[0, 1]"]),
        ({"adapter": {"lora_options": {"use_dora": True}}}, ["model.lora_options", "use_dora"]),
    ],
)
def test_another_base_quantization_or_shape_is_refused_with_both_sides(change, words):
    with pytest.raises(UserError) as refused:
        check_identity({**OWN, **change}, OWN, "It")
    message = str(refused.value)
    assert message.startswith("It ")
    assert "\n" not in message
    assert all(word in message for word in words)
    assert HASHES[0] not in message


@pytest.mark.parametrize(
    "stored",
    [
        {},
        OWN,
        {"base": "b", "fingerprint": HASHES[0]},  # moved
        {"adapter": {}},
        {"adapter": {"alpha": 8, "dropout": 0.5}},  # told among the settings
    ],
)
def test_what_is_not_known_or_only_named_otherwise_passes(stored):
    check_identity(stored, OWN, "It")


def test_double_quantization_is_nothing_to_eight_bits():
    check_identity(
        {"quantization": "int8", "double_quant": False}, {"quantization": "int8", "double_quant": True}, "It"
    )


@pytest.fixture
def base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base)


def test_the_config_hash_holds_what_changes_the_function_and_nothing_else(base):
    first = hash_config(base.config)
    base.config.transformers_version, base.config.pad_token_id, base.config.use_cache = "9.9", 5, False
    assert hash_config(base.config) == first
    base.config.rope_parameters = {**base.config.rope_parameters, "rope_theta": 5e5}
    assert hash_config(base.config) != first


def test_targets_and_layers_are_read_off_the_modules_however_they_were_chosen(base):
    model = add_adapters(base, rank=3, alpha=5, dropout=0.25, target_modules="attention", layers="last:1")
    assert describe_adapter(model) == {
        "rank": 3,
        "alpha": 5,
        "dropout": 0.25,
        "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "layers": [1],
        "lora_options": {},
    }


def test_options_that_change_shape_or_function_are_described(base):
    options = {"use_dora": True, "use_rslora": True, "init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 4}}
    described = describe_adapter(add_adapters(base, lora_options=options))["lora_options"]
    assert described == {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 4}}
    assert peft.LoraConfig().use_dora is False


def test_data_are_compared_by_name_and_only_where_both_sides_know():
    stored, own = {"tokenizer": HASHES[0], "train": "1", "val": "2"}, {"tokenizer": HASHES[1], "train": "1"}
    assert data_differences(stored, own) == {"tokenizer": "tokenizer (0123456789ab there, fedcba987654 here)"}


@pytest.mark.parametrize("trainer", [None, SimpleNamespace(datamodule=None), SimpleNamespace(datamodule=object())])
def test_a_data_module_that_says_nothing_of_itself_is_let_be(trainer):
    assert identity_of_data(trainer) == {}
