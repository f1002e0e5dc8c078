"""A fingerprint says which numbers a base holds, however they are cut into files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qlora_lightning.base.folder import fingerprint
from qlora_lightning.base.tensors import ShardWriter


@pytest.fixture
def save(tmp_path):
    def write(name, tensors, shard_bytes=10_000):
        (tmp_path / name).mkdir()
        writer = ShardWriter(tmp_path / name, shard_bytes)
        for each in tensors.items():
            writer.add(*each)
        writer.finish()
        return tmp_path / name

    return write


def test_it_does_not_depend_on_sharding_and_stays_the_same_for_ever(save, tensors):
    folders = [save(str(size), tensors, size) for size in (10_000, 600, 1)]
    assert [len(list(folder.glob("*.safetensors"))) for folder in folders] == [1, 2, 3]
    assert len({fingerprint(folder) for folder in folders}) == 1
    zeros = {"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.bfloat16)}
    # Adapters that were trained hold it: another value needs another _FORMAT.
    assert fingerprint(save("zeros", zeros)) == "a2c13d250afbbd8c7eeee184419baf1001b077963fd470182b722cc8628aa146"


def test_one_value_one_name_one_dtype_or_one_shape_changes_it(save, tensors):
    name = "model.norm.weight"
    changed = tensors[name].clone()
    changed[3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    others = {other: tensor for other, tensor in tensors.items() if other != name}
    variants = [
        tensors,
        {**others, name: changed},
        {**others, "model.norm2.weight": tensors[name]},
        {**others, name: tensors[name].view(torch.int32)},
        {**others, name: tensors[name].view(2, 4)},
    ]
    assert len({fingerprint(save(str(number), variant)) for number, variant in enumerate(variants)}) == 5


def test_it_is_kept_until_a_file_changes_if_the_cache_can_be_written(model_folder, cache, tensors, monkeypatch):
    first = fingerprint(model_folder)
    (kept,) = (cache / "fingerprints").iterdir()
    kept.write_text(json.dumps({"fingerprint": "from the cache"}))
    assert fingerprint(model_folder) == "from the cache"
    kept.write_text("{")
    assert fingerprint(model_folder) == first
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(model_folder / "config.json"))
    assert fingerprint(model_folder) == first
    save_file({**tensors, "extra": torch.zeros(1)}, model_folder / "model.safetensors")
    assert fingerprint(model_folder) != first
