"""An adapter finds its base again and computes what was saved; another base, quantization or shape is rejected."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.identity import check_identity, data_differences, hash_config
from qlora_lightning.model.load.opened_adapter import find_adapter, open_adapter
from qlora_lightning.support.errors import UserError
from tests.equality import same
from tests.steps import make_module

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """A module of rank 4 whose B is not zero, and its adapter folder."""
    module = make_module(tiny_base, target_modules="attention")
    folder = tmp_path_factory.mktemp("run") / "adapter"
    module.save_adapter(folder)
    return module, folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "run" / "adapter")


def change(folder, file="qlora_lightning.json", **values):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))


# ---- opened to be used -----------------------------------------------------------------------------------------------


def test_by_its_own_or_its_run_folder_it_is_found_and_computes_what_was_saved(made, folder, tiny_base):
    for place in (folder, folder.parent):
        source = find_adapter(str(place))
        assert (source.folder, source.base.folder) == (folder, tiny_base)
        assert (source.quantization, source.double_quant, source.compute_dtype) == ("nf4", True, torch.float32)
        assert not source.is_stored_quantized
    ids, opened = torch.tensor([[5, 6, 7, 8]]), open_adapter(source).model.eval().cpu()
    with torch.no_grad():
        expected = made[0].model.eval()(input_ids=ids).logits
        torch.testing.assert_close(opened(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_base_that_moved_is_found_where_it_was_loaded_from_or_by_another_name(folder, tiny_base, tmp_path):
    change(folder, base="./models/gone")
    assert find_adapter(folder).base.folder == tiny_base
    change(folder, "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"The base of .* is not found\. Base './models/gone'.*name it with --base"):
        find_adapter(folder)
    assert find_adapter(folder, base=str(tiny_base)).base.folder == tiny_base


def test_another_base_is_rejected(folder, tiny_base, tmp_path):
    other = shutil.copytree(tiny_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({**tensors, "model.norm.weight": 2 * tensors["model.norm.weight"]}, other / "model.safetensors")
    with pytest.raises(UserError, match="was trained on another base"):
        find_adapter(folder, base=str(other))


def test_a_folder_of_another_tool_is_opened_by_the_name_in_its_config(folder, tiny_base):
    (folder / "qlora_lightning.json").unlink()
    source = find_adapter(folder)
    assert (source.base.folder, source.quantization) == (tiny_base, None)
    change(folder, "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(UserError, match="does not name its base"):
        find_adapter(folder)


# ---- trained further -------------------------------------------------------------------------------------------------


def test_training_continues_with_the_shape_of_the_folder_whatever_options_say(tiny_base, made):
    module, folder = made
    options = {"rank": 16, "target_modules": "mlp", "layers": "last:1", "lora_options": {"use_dora": True}}
    again = QLoRAModule(str(tiny_base), compute_dtype="fp32", adapter=str(folder), **options)
    again.configure_model()
    assert same(dict(again.state_dict()), dict(module.state_dict()))
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in again.named_parameters())
    shape = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": sorted(ATTENTION), "layers": [0, 1]}
    assert again.identity["adapter"] == {**shape, "lora_options": {}}


def test_another_quantization_is_rejected(tiny_base, made):
    module = QLoRAModule(str(tiny_base), compute_dtype="fp32", adapter=str(made[1]), quantization="int8")
    with pytest.raises(UserError, match=r"with model\.quantization nf4, but here it is int8"):
        module.configure_model()


# ---- compared --------------------------------------------------------------------------------------------------------

HASHES = ["0123456789abcdef" * 4, "fedcba9876543210" * 4]
OWN = {"base": "a", "fingerprint": HASHES[0], "config_hash": HASHES[0], "quantization": "nf4", "double_quant": True}


@pytest.mark.parametrize(
    ("stored", "own", "words"),
    [
        ({}, {}, None),
        ({"base": "b"}, {}, None),  # moved
        ({"double_quant": False, "quantization": "int8"}, {"quantization": "int8"}, None),  # scales of 4 bits only
        ({"double_quant": False}, {}, "model.double_quant false, but here it is true"),
        ({"config_hash": HASHES[1]}, {}, r"config fedcba987654\) there.*config 0123456789ab\) here.*or by --base"),
    ],
)
def test_another_function_is_rejected_with_both_sides(stored, own, words):
    """Another base, rank, alpha, targets, layers and options: see ``tests/test_wrong_inputs.py``."""
    if words is None:
        check_identity({**OWN, **stored}, {**OWN, **own}, "It")
        check_identity(stored, {}, "It")  # what is unknown passes
        return
    with pytest.raises(UserError, match=words):
        check_identity({**OWN, **stored}, {**OWN, **own}, "It")


def test_the_config_hash_holds_what_changes_the_function_and_nothing_else(tiny_base):
    config = AutoConfig.from_pretrained(tiny_base)
    first = hash_config(config)
    config.transformers_version, config.pad_token_id, config.use_cache = "9.9", 5, False
    assert hash_config(config) == first
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 5e5}
    assert hash_config(config) != first


def test_data_are_compared_by_name_and_only_if_both_sides_know():
    stored = {"tokenizer": HASHES[0], "train": "1", "val": "2", "samples": {"train": 1000}}
    own = {"tokenizer": HASHES[1], "train": "3", "samples": {"train": 900}}
    assert data_differences(stored, own) == {
        "tokenizer": "tokenizer (0123456789ab there, fedcba987654 here)",
        "train": "training samples (1,000 there, 900 here)",
    }
