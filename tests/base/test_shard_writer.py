import json

import torch

from qlora_lightning.base.folder import TensorFiles
from qlora_lightning.base.tensors import ShardWriter


def test_what_fits_is_one_file(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.ones(3))
    assert writer.finish() == [tmp_path / "model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_more_are_shards_with_an_index_that_is_read_back(tmp_path):
    writer = ShardWriter(tmp_path, shard_bytes=100)
    tensors = {f"t{number}": torch.full((size,), float(number)) for number, size in enumerate((10, 15, 15, 100, 1))}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    names = [file.name for file in writer.finish()]
    # 40 + 60 bytes are full, 60, 400 is a shard of its own, 4
    assert names == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 141}
    assert [index["weight_map"][name][6:11] for name in tensors] == ["00001", "00001", "00002", "00003", "00004"]
    read = TensorFiles(tmp_path, "x")
    assert all(torch.equal(read.read(name), tensor) for name, tensor in tensors.items())
