"""Every command that reads an adapter refuses one that holds what no model can compute with."""

import math
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qlora_lightning.cli import main
from tests.adapters import make_adapter, make_run


@pytest.fixture(scope="module")
def place(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    make_run(folder / "run", tiny_base)
    make_adapter(folder / "good", tiny_base)
    file = folder / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.lora_B.weight"))
    tensors[name][3, 1] = math.nan
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "evaluate --config run/config.yaml --model.compute_dtype fp32 --adapter run/adapter",
        "evaluate --config run/config.yaml --model.compute_dtype fp32 --adapter good --adapter run/adapter",
        "validate --config run/config.yaml --model.compute_dtype fp32",
        "chat --adapter run/adapter --prompt x",
        "merge --adapter run/adapter --out merged",
    ],
)
def test_an_adapter_with_nan_is_refused_by_the_name_of_its_tensor(line, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(line.split()) == 2
    message = capsys.readouterr().err.rpartition("qlora-lightning: ")[2]
    assert "layers.1.mlp.up_proj.lora_B.weight are NaN or infinite" in message
    assert message.count("\n") == 1
    assert not (place / "merged").exists()


@pytest.mark.parametrize(
    "line",
    [
        "evaluate --config run/config.yaml --adapter odd",
        "chat --adapter odd --prompt x",
        "merge --adapter odd --out merged",
        "merge --adapter odd --adapter-gguf odd.gguf",
        "plan --adapter odd",
        "fit --config run/config.yaml --data.train run/val.jsonl --trainer.default_root_dir new --model.adapter odd",
        "push --adapter odd --repo me/mine",
    ],
)
def test_an_adapter_whose_config_no_model_can_compute_with_is_refused(line, place, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "place"))
    shutil.copytree("good", "odd")
    file = tmp_path / "place" / "odd" / "adapter_config.json"
    file.write_text(re.sub(r'"lora_alpha": \d+', '"lora_alpha": 1e308', file.read_text()))
    assert main(line.split()) == 2
    message = capsys.readouterr().err.rpartition("qlora-lightning: ")[2]
    words = "lora_alpha is 1e+308, expected a positive number up to 1,000,000"
    assert message == f"odd/adapter_config.json is damaged: {words}. Copy the adapter folder again.\n"
    assert not any((tmp_path / "place" / name).exists() for name in ("merged", "odd.gguf"))
