"""A folder that this package trains is a whole LLaMA in safetensors, which its fingerprint identifies."""

import pytest
import torch
from huggingface_hub import save_torch_state_dict

from qlora_lightning.base.base_folder import BaseFolder, fingerprint, open_base


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(16, 8, generator=generator),
        "model.norm.weight": torch.ones(8),
        "lm_head.weight": torch.randn(16, 8, generator=generator).bfloat16(),
    }


def save(folder, tensors, shard_bytes=10_000):
    folder.mkdir()
    save_torch_state_dict(tensors, folder, max_shard_size=shard_bytes)
    return folder


def test_a_llama_is_opened_where_it_is_and_without_its_weights_if_they_are_not_asked_for(tmp_path, tensors):
    folder = save(tmp_path / "tiny-llama", tensors, 600)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert open_base(str(folder)) == BaseFolder(str(folder), folder, "folder", None)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert open_base(str(folder), weights=False).folder == folder


# ---- the fingerprint -------------------------------------------------------------------------------------------------


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
