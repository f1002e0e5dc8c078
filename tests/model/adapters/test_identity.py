"""An adapter of another base, quantization or shape is never loaded."""

import pytest
from transformers import AutoModelForCausalLM

from qlora_lightning.model.adapters.identity import check_identity, data_differences, describe_adapter, hash_config
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
    ("stored", "words"),
    [
        ({}, None),
        ({"base": "b", "fingerprint": HASHES[0]}, None),  # moved
        ({"adapter": {"dropout": 0.5}}, None),  # reported among the settings
        ({"adapter": {"alpha": 8}}, "model.alpha 8, but here it is 4. Set model.alpha to 8"),
        ({"config_hash": HASHES[1]}, r"config fedcba987654\) there.*config 0123456789ab\) here.*or by --base"),
        ({"double_quant": False}, "model.double_quant false, but here it is true"),
        ({"adapter": {"lora_options": {"use_dora": True}}}, "model.lora_options .*use_dora"),
    ],
)
def test_another_function_is_refused_with_both_sides_and_what_is_unknown_passes(stored, words):
    """Another base, rank, targets, layers and quantization: see ``tests/test_wrong_inputs.py``."""
    if words is None:
        check_identity(stored, OWN, "It")
        return
    with pytest.raises(UserError, match=words):
        check_identity({**OWN, **stored}, OWN, "It")


def test_the_scales_of_4_bits_are_not_compared_of_int8():
    own = {"quantization": "int8", "double_quant": True}
    check_identity({**own, "double_quant": False}, own, "It")


@pytest.fixture
def base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base)


def test_the_config_hash_holds_what_changes_the_function_and_nothing_else(base):
    first = hash_config(base.config)
    base.config.transformers_version, base.config.pad_token_id, base.config.use_cache = "9.9", 5, False
    assert hash_config(base.config) == first
    base.config.rope_parameters = {**base.config.rope_parameters, "rope_theta": 5e5}
    assert hash_config(base.config) != first


def test_the_shape_is_read_off_the_modules_however_they_were_chosen(base):
    options = {"use_dora": True, "init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 4}}
    settings = {"rank": 3, "alpha": 5, "dropout": 0.25, "target_modules": "attention", "layers": "last:1"}
    assert describe_adapter(add_adapters(base, lora_options=options, **settings)) == {
        "rank": 3,
        "alpha": 5,
        "dropout": 0.25,
        "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "layers": [1],
        "lora_options": {"use_dora": True, "rank_pattern": {"q_proj": 4}},
    }


def test_data_are_compared_by_name_and_only_if_both_sides_know():
    stored = {"tokenizer": HASHES[0], "train": "1", "val": "2", "samples": {"train": 1000}}
    own = {"tokenizer": HASHES[1], "train": "3", "samples": {"train": 900}}
    assert data_differences(stored, own) == {
        "tokenizer": "tokenizer (0123456789ab there, fedcba987654 here)",
        "train": "training samples (1,000 there, 900 here)",
    }
