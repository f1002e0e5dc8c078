from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_lightning.base.tensors import read_spans
from qlora_lightning.support.errors import UserError


def test_spans_lead_to_the_tensors_bytes(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8), "b": torch.zeros(0)}, file)
    spans = {span.name: span for span in read_spans(file)}
    assert (spans["a"].dtype, spans["a"].shape, spans["a"].size_bytes) == ("U8", (2, 2), 4)
    assert file.read_bytes()[spans["a"].start :][:4] == bytes([1, 2, 3, 4])
    assert (spans["b"].shape, spans["b"].size_bytes) == ((0,), 0)


@pytest.mark.parametrize("size", [0, 4, 20, -1])
def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path: Path, size: int) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4)}, file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"x\.safetensors is (not a whole safetensors file|cut off)"):
        read_spans(file)


def test_another_file_under_the_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"x\.safetensors is not a whole safetensors file"):
        read_spans(file)
