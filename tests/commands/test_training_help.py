import json

import pytest
import yaml

from qlora_lightning.cli import main
from qlora_lightning.commands.training_help import EXAMPLES

CONFIG = {
    "model": {"base": "tiny", "rank": 2, "compute_dtype": "fp32", "learning_rate": 1e-2},
    "data": {
        "train": "configs/quickstart/train.jsonl",
        "val": "configs/quickstart/val.jsonl",
        "format": "alpaca",
        "batch_size": 8,
    },
    "evaluation": {"enabled": False},
    "trainer": {"accelerator": "cpu", "default_root_dir": "runs/quickstart"},
}


@pytest.fixture
def folder(tiny_base, rows_file, tmp_path, monkeypatch):
    """A folder in which the examples find what they name, on a tiny base."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "configs" / "quickstart").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / "configs" / "quickstart" / f"{split}.jsonl").write_text(rows_file.read_text())
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def run(example):
    assert main(example.split()[1:]) == 0, example


def test_the_examples_of_help_run_as_they_stand_one_after_the_other(folder, capsys):
    for verb in ("fit", "validate", "test", "predict"):
        for example in EXAMPLES[verb].splitlines():
            run(example)
    assert json.loads((folder / "runs" / "rank-16" / "adapter" / "adapter_config.json").read_text())["r"] == 16
    assert len((folder / "runs" / "quickstart" / "predictions.jsonl").read_text().splitlines()) == 16
    assert "test_loss" in capsys.readouterr().out


@pytest.mark.parametrize("verb", EXAMPLES)
def test_help_begins_with_what_the_command_does_and_its_examples(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    before, options = shown.split("\noptions:\n")
    assert before.startswith(f"usage: qlora-lightning {verb} --config FILE [--KEY.NAME VALUE …]\n\n")
    assert before.endswith(f"\nexamples:\n{EXAMPLES[verb]}\n")
    assert "--model.rank" in before
    assert "--trainer.max_epochs" in options
