"""What a manifest says about how to do a run again is true."""

import json
import shlex

import pytest
import yaml

from qlora_lightning.cli import main
from qlora_lightning.model import generate


def test_the_command_in_the_manifest_gives_the_same_adapter(tiny_base, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain = generate._generate  # answers of a random base run on until they are cut: two tokens will do
    monkeypatch.setattr(generate, "_generate", lambda *arguments: plain(*arguments[:-1], 2))
    config = {
        "model": {"base": str(tiny_base), "rank": 2, "dropout": 0.1, "learning_rate": 0.01},
        "data": {"train": str(rows_file), "val": str(rows_file), "batch_size": 4},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "default_root_dir": "my runs/a"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    typed = ["fit", "--config", "c.yaml", "--model.rank", "4", "--gpu_memory", "false"]
    assert main(typed) == 0
    first = json.loads((tmp_path / "my runs/a/manifest.json").read_text())
    assert first["command"] == "qlora-lightning fit --config c.yaml --model.rank 4 --gpu_memory.enabled=false"
    words = shlex.split(first["reproduce"])
    assert words[0] == "qlora-lightning"
    assert main(words[1:]) == 0
    again = json.loads((tmp_path / "my runs/a-again/manifest.json").read_text())
    one, other = (tmp_path / "my runs" / name / "adapter" / "adapter_model.safetensors" for name in ("a", "a-again"))
    assert one.read_bytes() == other.read_bytes()
    for part in ("base", "data", "packages"):
        assert again[part] == first[part]
    assert again["metrics"]["val_loss"] == pytest.approx(first["metrics"]["val_loss"], rel=0, abs=0)
    capsys.readouterr()
    assert main(["report", "my runs/a", "my runs/a-again", "--json", "both.json"]) == 0
    assert json.loads((tmp_path / "both.json").read_text())["differing_settings"] == {}
