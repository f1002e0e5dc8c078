"""Every command that reads an adapter rejects one that no model can compute with, by name."""

import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qlora_lightning.cli import main
from tests.adapters import make_run

NAN = "layers.1.mlp.up_proj.lora_B.weight are NaN or infinite"


@pytest.fixture(scope="module")
def place(tiny_base, tmp_path_factory):
    """A good run, and an adapter that holds a NaN."""
    folder = tmp_path_factory.mktemp("damaged")
    make_run(folder / "good", tiny_base)
    (folder / "tiny").symlink_to(tiny_base)
    shutil.copytree(folder / "good" / "adapter", folder / "nan")
    file = folder / "nan" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.lora_B.weight"))][3, 1] = math.nan
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "evaluate --config good/config.yaml --model.compute_dtype fp32 --adapter nan",
        "evaluate --config good/config.yaml --model.compute_dtype fp32 --adapter good --adapter nan",
        "validate --config good/config.yaml --model.compute_dtype fp32 --model.adapter nan",
        "chat --adapter nan --prompt x",
        "merge --adapter nan --out merged --rows 0",
    ],
)
def test_an_adapter_that_cannot_be_computed_with_is_rejected(line, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(line.split()) == 2
    message = capsys.readouterr().err.rpartition("qlora-lightning: ")[2]
    assert NAN in message
    assert message.count("\n") == 1
    assert not (place / "merged").exists()
