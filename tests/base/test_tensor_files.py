import pytest
import torch
from safetensors.torch import save_file

from qlora_lightning.base.folder import TensorFiles
from qlora_lightning.support.errors import UserError


def test_tensors_are_read_as_they_are_stored(tmp_path):
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "b": torch.tensor([-1, 7], dtype=torch.int8),
        "c": torch.tensor(2.5),
        "d": torch.empty(0, 4),
        "e": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path, "x")
    assert set(files) == set(tensors)
    assert files.shape("a") == (2, 3)
    for name, tensor in tensors.items():
        assert files.read(name).dtype == tensor.dtype
        assert torch.equal(files.read(name), tensor)


def test_a_missing_tensor_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"Base x: expected the tensor b in .* found none"):
        TensorFiles(tmp_path, "x").read("b")


def test_a_file_that_became_shorter_is_refused(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path, "x")
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(200)
    with pytest.raises(UserError, match="became shorter"):
        files.read("a")
