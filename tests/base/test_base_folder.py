"""A folder that this package trains is a whole LLaMA in safetensors, which its fingerprint identifies."""

import json
import os

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from qlora_lightning import UserError
from qlora_lightning.base.base_folder import BaseFolder, fingerprint, open_base

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(16, 8, generator=generator),
        "model.norm.weight": torch.ones(8),
        "lm_head.weight": torch.randn(16, 8, generator=generator).bfloat16(),
    }


@pytest.fixture
def model_folder(tmp_path, tensors):
    """A folder that passes for a LLaMA: config.json and model.safetensors."""
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def rename_weights(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def shard(names):
    def change(folder):
        rename_weights("a.safetensors")(folder)
        (folder / INDEX).write_text(json.dumps({"weight_map": dict(enumerate(names))}))

    return change


def test_a_llama_is_opened_where_it_is(model_folder):
    shard(["a.safetensors"])(model_folder)
    assert open_base(str(model_folder)) == BaseFolder(str(model_folder), model_folder, "folder", None)


CONFIG_FAULTS = [
    (write("config.json", b"{"), r"config\.json is not JSON"),
    (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        r"found no config\.json .*It is an adapter folder: give it as model\.adapter",
    ),
]
WEIGHT_FAULTS = [
    (rename_weights("pytorch_model.bin"), r"expected model\.safetensors .*Pickles .*refused.*save_pretrained"),
    (shard(["a.safetensors", "b.safetensors"]), r"b\.safetensors"),
    (lambda folder: os.truncate(folder / "model.safetensors", 600), r"model\.safetensors is not a whole safetensors"),
]


@pytest.mark.parametrize(("change", "words"), CONFIG_FAULTS + WEIGHT_FAULTS)
def test_what_cannot_be_trained_is_refused_by_name(model_folder, change, words):
    change(model_folder)
    with pytest.raises((UserError, FileNotFoundError), match=words):
        open_base(str(model_folder))
    if (change, words) in WEIGHT_FAULTS:
        open_base(str(model_folder), weights=False)


# ---- the fingerprint -------------------------------------------------------------------------------------------------


def save(folder, tensors, shard_bytes=10_000):
    folder.mkdir()
    save_torch_state_dict(tensors, folder, max_shard_size=shard_bytes)
    return folder


def test_it_does_not_depend_on_sharding_and_stays_the_same_for_ever(tmp_path, tensors):
    folders = [save(tmp_path / str(size), tensors, size) for size in (10_000, 600)]
    assert [len(list(folder.glob("*.safetensors"))) for folder in folders] == [1, 2]
    assert fingerprint(folders[0]) == fingerprint(folders[1])
    zeros = {"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.bfloat16)}
    # Adapters that were trained hold it: another value needs another _FORMAT.
    expected = "a2c13d250afbbd8c7eeee184419baf1001b077963fd470182b722cc8628aa146"
    assert fingerprint(save(tmp_path / "zeros", zeros)) == expected


def test_one_value_one_name_one_dtype_or_one_shape_changes_it(tmp_path, tensors):
    name, norm = "model.norm.weight", tensors.pop("model.norm.weight")
    changed = norm.clone()
    changed[3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    variants = [{name: norm}, {name: changed}, {"norm2": norm}, {name: norm.view(torch.int32)}, {name: norm.view(2, 4)}]
    assert len({fingerprint(save(tmp_path / f"{n}", tensors | each)) for n, each in enumerate(variants)}) == 5
