import math

import pytest
import torch
from safetensors.torch import save_file

from qlora_lightning.model.adapters.reading import read_tensors
from qlora_lightning.support.errors import UserError


@pytest.fixture
def folder(tmp_path):
    def write(**tensors):
        save_file({name: torch.tensor(values) for name, values in tensors.items()}, tmp_path / FILE)
        return tmp_path

    return write


FILE = "adapter_model.safetensors"


def test_tensors_come_by_their_names(folder):
    tensors = read_tensors(folder(a=[1.0, 2.0], b=[3.0]))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [1.0, 2.0], "b": [3.0]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_by_the_name_of_its_tensor(folder, value):
    with pytest.raises(UserError, match="is damaged: 1 of 3 values of bad are NaN or infinite"):
        read_tensors(folder(good=[1.0], bad=[0.0, value, 1.0]))


def test_a_file_that_is_cut_off_is_refused(folder):
    file = folder(a=[1.0, 2.0]) / FILE
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not a whole safetensors file, but cut off"):
        read_tensors(file.parent)
