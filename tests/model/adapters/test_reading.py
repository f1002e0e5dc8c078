import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_lightning import QLoRAModule
from qlora_lightning.base.adapter_folder import read_identity
from qlora_lightning.model.adapters.reading import fill_adapter, open_adapter_folder, read_tensors
from qlora_lightning.support.errors import UserError


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
    told = r"cannot be put on this base: \S+ is \[.*\] in the file, where this base and .* want \[.*\]\. Name"
    with pytest.raises(UserError, match=told):
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
