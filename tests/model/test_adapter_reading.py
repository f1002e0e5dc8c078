import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_lightning import QLoRAModule
from qlora_lightning.errors import UserError
from qlora_lightning.model.adapter_reading import fill_adapter, open_adapter_folder, read_identity
from qlora_lightning.model.adapter_tensors import read_tensors


@pytest.fixture(scope="module")
def written(tiny_base, tmp_path_factory):
    module = QLoRAModule(str(tiny_base), compute_dtype="fp32", rank=2, target_modules="attention")
    module.configure_model()
    folder = tmp_path_factory.mktemp("written") / "adapter"
    module.save_adapter(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "adapter")


@pytest.fixture
def base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base)


def weights(folder):
    return folder / "adapter_model.safetensors"


def test_the_identity_says_what_the_adapter_belongs_to(written, tiny_base):
    identity = read_identity(written)
    assert identity["format_version"] == 1
    assert identity["base"] == str(tiny_base)
    assert len(identity["fingerprint"]) == len(identity["config_hash"]) == 64
    assert (identity["adapter"]["rank"], identity["adapter"]["layers"]) == (2, [0, 1])


def test_an_adapter_made_otherwise_is_given_the_tensors_of_a_folder(written, tiny_base, tmp_path):
    module = QLoRAModule(str(tiny_base), compute_dtype="fp32", rank=2, target_modules="attention")
    module.configure_model()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.fill_(3.0)
    fill_adapter(module.model, written)
    module.save_adapter(tmp_path / "again")
    assert weights(tmp_path / "again").read_bytes() == weights(written).read_bytes()


def test_an_adapter_of_another_rank_or_other_modules_is_not_filled(written, tiny_base):
    for options in ({"rank": 4, "target_modules": "attention"}, {"rank": 2, "target_modules": "mlp"}):
        module = QLoRAModule(str(tiny_base), compute_dtype="fp32", **options)
        module.configure_model()
        with pytest.raises(UserError, match=re.escape(str(written))):
            fill_adapter(module.model, written)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_adapter_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"is not an adapter folder: expected adapter_config.json.*missing {name}"):
        read_identity(folder)


def test_a_folder_of_another_tool_says_nothing_of_its_base(folder):
    (folder / "qlora_lightning.json").unlink()
    assert read_identity(folder) == {}


@pytest.mark.parametrize("name", ["adapter_config.json", "qlora_lightning.json"])
def test_files_that_are_no_json_are_refused(folder, name):
    (folder / name).write_text((folder / name).read_text()[:-9])
    with pytest.raises(UserError, match=f"{name} is not JSON, or it is cut off"):
        read_identity(folder)
    (folder / name).write_text("[]")
    with pytest.raises(UserError, match=f"{name}: expected a JSON object, found list"):
        read_identity(folder)


def test_a_newer_folder_is_refused(folder):
    (folder / "qlora_lightning.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match=r"format version 99.*update qlora_lightning"):
        read_identity(folder)


def test_another_kind_of_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(UserError, match="peft_type IA3: expected LORA"):
        read_identity(folder)


def test_tensors_go_to_their_places(folder, base):
    tensors = load_file(weights(folder))
    model = open_adapter_folder(base, folder)
    own = {name.replace(".default", ""): tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert own.keys() == tensors.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("fault", ["missing", "foreign"])
def test_tensors_that_are_missing_or_find_no_place_are_refused(folder, base, fault):
    tensors = load_file(weights(folder))
    name = next(iter(tensors))
    tensor = tensors.pop(name)
    if fault == "foreign":
        tensors |= {name: tensor, re.sub(r"layers.\d", "layers.7", name): tensor.clone()}
    save_file(tensors, weights(folder), {"format": "pt"})
    with pytest.raises(UserError, match=f"does not fit this base: .*1 .*{fault}"):
        open_adapter_folder(base, folder)


def test_tensors_of_another_shape_are_refused(folder, base):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(
        UserError,
        match=r"cannot be put on this base: \S+ is \[.*\] in the file, where this base and .* want \[.*\]\. Name",
    ):
        open_adapter_folder(base, folder)


@pytest.mark.parametrize("size", [0, 5, 4000])
def test_weights_that_are_cut_off_are_refused(folder, base, size):
    weights(folder).write_bytes(weights(folder).read_bytes()[:size])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        open_adapter_folder(base, folder)


def test_weights_that_may_not_be_read_are_not_called_damaged(folder, monkeypatch):
    def deny(file, mode="r", **options):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(PermissionError, match=r"adapter_model\.safetensors"):
        read_tensors(folder)


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("qlora_lightning.json", "base", 3, "base is 3, expected text"),
        ("qlora_lightning.json", "quantization", "q4", 'quantization is "q4", expected nf4 or fp4'),
        ("qlora_lightning.json", "adapter", [], "adapter is a list, expected an object"),
        ("qlora_lightning.json", "adapter", {"rank": "8"}, 'adapter.rank is "8", expected a whole number'),
        ("qlora_lightning.json", "data", {"settings": 3}, "data.settings is 3"),
        ("qlora_lightning.json", "data", {"settings": {"system": []}}, "data.settings.system is a list, expected text"),
        ("qlora_lightning.json", "format_version", "1", 'format_version is "1"'),
        ("adapter_config.json", "base_model_name_or_path", 3, "base_model_name_or_path is 3"),
        ("adapter_config.json", "r", "x", 'r is "x", expected a positive whole number up to 65,536'),
        ("adapter_config.json", "r", None, "r is missing"),
        ("adapter_config.json", "lora_alpha", -16, "lora_alpha is -16, expected a positive number up to 1,000,000"),
        ("adapter_config.json", "lora_alpha", [16], "lora_alpha is a list, expected a positive number up to 1,000,000"),
        ("adapter_config.json", "alpha_pattern", {"q_proj": -1}, "alpha_pattern.q_proj is -1, expected a positive"),
        ("adapter_config.json", "target_modules", 3, "target_modules is 3, expected text or a list"),
    ],
)
def test_values_of_wrong_types_are_refused(folder, name, key, value, words):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {key: value}))
    with pytest.raises(UserError, match=re.escape(f"{name} is damaged: {words}")):
        read_identity(folder)
