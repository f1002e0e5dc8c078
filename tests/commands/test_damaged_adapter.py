"""Every command that reads an adapter rejects one that no model can compute with, by name."""

import math
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qlora_lightning.cli import main
from tests.adapters import make_run

NAN = "layers.1.mlp.up_proj.lora_B.weight are NaN or infinite"
ALPHA = "adapter_config.json is damaged: lora_alpha is 1e+308, expected a positive number up to 1,000,000"


@pytest.fixture(scope="module")
def place(tiny_base, tmp_path_factory):
    """A good run, one whose adapter holds a NaN, and one with an absurd alpha."""
    folder = tmp_path_factory.mktemp("damaged")
    make_run(folder / "good", tiny_base)
    (folder / "tiny").symlink_to(tiny_base)
    for name in ("nan", "alpha"):
        shutil.copytree(folder / "good" / "adapter", folder / name)
    file = folder / "nan" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.lora_B.weight"))][3, 1] = math.nan
    save_file(tensors, file, {"format": "pt"})
    file = folder / "alpha" / "adapter_config.json"
    file.write_text(re.sub(r'"lora_alpha": \d+', '"lora_alpha": 1e308', file.read_text()))
    return folder


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evaluate --config good/config.yaml --model.compute_dtype fp32 --adapter nan", NAN),
        ("evaluate --config good/config.yaml --model.compute_dtype fp32 --adapter good --adapter nan", NAN),
        ("validate --config good/config.yaml --model.compute_dtype fp32 --model.adapter nan", NAN),
        ("chat --adapter nan --prompt x", NAN),
        ("merge --adapter nan --out merged --rows 0", NAN),
        ("evaluate --config good/config.yaml --adapter alpha", ALPHA),
        ("chat --adapter alpha --prompt x", ALPHA),
        ("merge --adapter alpha --adapter-gguf alpha.gguf", ALPHA),
        ("plan --adapter alpha", ALPHA),
        ("fit --model.base tiny --data.train good/val.jsonl --model.adapter alpha", ALPHA),
    ],
)
def test_an_adapter_that_cannot_be_computed_with_is_rejected(line, words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(line.split()) == 2
    message = capsys.readouterr().err.rpartition("qlora-lightning: ")[2]
    assert words in message
    assert message.count("\n") == 1
    assert not (place / "merged").exists()
    assert not (place / "alpha.gguf").exists()
