"""What a run folder says about how to repeat the run, and to ask its adapter as in training, is true."""

import json
import shlex
import shutil
from datetime import date

import yaml
from transformers import AutoTokenizer

from qlora_lightning.cli import main


def test_the_command_in_the_manifest_gives_the_same_adapter(tiny_base, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"base": str(tiny_base), "rank": 2, "dropout": 0.1, "learning_rate": 0.01},
        "data": {"train": str(rows_file), "val": str(rows_file), "batch_size": 4},
        "evaluation": {"enabled": False},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "default_root_dir": "my runs/a"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "c.yaml", "--model.rank", "4", "--gpu_memory", "false"]) == 0
    first = json.loads((tmp_path / "my runs/a/manifest.json").read_text())
    assert first["command"] == "qlora-lightning fit --config c.yaml --model.rank 4 --gpu_memory.enabled=false"
    saved = yaml.safe_load((tmp_path / "my runs/a/config.yaml").read_text())
    assert saved["data"]["tokenizer"] is None  # it follows the base
    words = shlex.split(first["reproduce"])
    assert words[0] == "qlora-lightning"
    assert main(words[1:]) == 0
    again = json.loads((tmp_path / "my runs/a-again/manifest.json").read_text())
    one, other = (tmp_path / "my runs" / name / "adapter" / "adapter_model.safetensors" for name in ("a", "a-again"))
    assert one.read_bytes() == other.read_bytes()
    for part in ("base", "data", "packages"):
        assert again[part] == first[part]
    assert again["metrics"]["val_loss"] == first["metrics"]["val_loss"]
    assert main(["report", "my runs/a", "my runs/a-again", "--json", "both.json"]) == 0
    assert json.loads((tmp_path / "both.json").read_text())["differing_settings"] == {}


def test_tokenizer_template_and_its_options_follow_the_adapter(tiny_base, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, tmp_path / "dated")
    template = tmp_path / "dated" / "chat_template.jinja"
    dated = "{%- set today = strftime_now('%d %b %Y') %}{{- today + (motto | default('')) }}"
    template.write_text(dated + template.read_text())
    config = {
        "model": {"base": str(tiny_base)},
        "data": {
            "train": rows_file.name,
            "tokenizer": "dated",
            "template_options": {"motto": date(2026, 11, 27)},  # in YAML without quotes
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 1, "enable_progress_bar": False},
    }
    config["trainer"]["default_root_dir"] = "run"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "c.yaml"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["tokenizer"] == "dated"
    plain = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    question = [{"role": "user", "content": "What day is it?"}]
    prompt = plain.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("26 Jul 20242026-11-27<|im_start|>system\n")
    common = ["--adapter", "run/adapter", "--data.val", rows_file.name, "--rows", "2", "--max-new-tokens", "2"]
    assert main(["evaluate", *common]) == 0  # with the config of the run
    (tmp_path / "run" / "config.yaml").unlink()
    capsys.readouterr()
    assert main(["evaluate", *common]) == 0  # with the adapter folder alone
    assert "Warning" not in capsys.readouterr().out
    assert main(["evaluate", *common, "--data.template_options.motto", "Be rude."]) == 0
    assert "another chat template, so" in " ".join(capsys.readouterr().out.split())
    assert main(["evaluate", *common, "--data.template_options.moto", "Be rude."]) == 2
    assert "Did you mean 'motto'?" in capsys.readouterr().err
