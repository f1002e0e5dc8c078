"""Configs: short forms are read, and help can be followed."""

import json

import pytest
import yaml

from qlora_lightning.cli import COMMANDS, main
from qlora_lightning.commands.training import EXAMPLES, QLoRACLI

EXPRESSIONS = [(text, text) for text in ("mlp", r".*\.(q|v)_proj", r".*\.[01]{1,2}\.mlp.*")]
LIMITS = ("limit_train_batches", "limit_val_batches", "overfit_batches", "val_check_interval")


def test_one_is_a_batch_and_one_point_nought_all_of_them():
    given = dict(zip(LIMITS, ("1", "1.0", "0.25", "1"), strict=True))
    options = [f"--trainer.{name}={value}" for name, value in given.items()]
    read = QLoRACLI(["--config", "configs/quickstart.yaml", *options], with_trainer=False).config["trainer"]
    assert {name: str(read[name]) for name in LIMITS} == given


def test_names_with_commas_are_a_list_and_an_expression_stays_one():
    names = ["q_proj", "v_proj"]
    for typed, read in (("q_proj,v_proj", names), ("q_proj, v_proj", names), *EXPRESSIONS):
        options = ["--config", "configs/quickstart.yaml", "--model.target_modules", typed]
        model = QLoRACLI(options, with_trainer=False).config["model"]["init_args"]
        assert model["target_modules"] == read


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_usage_and_shows_its_examples(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: qlora-lightning {command} ")
    assert EXAMPLES.get(command, "") in shown


def test_the_examples_of_help_run_as_they_stand_one_after_the_other(
    tiny_base, rows_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "configs" / "quickstart").mkdir(parents=True)
    files = {split: f"configs/quickstart/{split}.jsonl" for split in ("train", "val")}
    for file in files.values():
        (tmp_path / file).write_text(rows_file.read_text())
    config = {
        "model": {"base": "tiny", "rank": 2, "compute_dtype": "fp32", "learning_rate": 1e-2},
        "data": {**files, "batch_size": 8},
        "evaluation": {"enabled": False},
        "trainer": {"accelerator": "cpu", "default_root_dir": "runs/quickstart"},
    }
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(config))
    for verb in ("fit", "validate", "test", "predict"):
        for example in EXAMPLES[verb].splitlines():
            assert main(example.split()[1:]) == 0, example
    assert json.loads((tmp_path / "runs" / "rank-16" / "adapter" / "adapter_config.json").read_text())["r"] == 16
    assert len((tmp_path / "runs" / "quickstart" / "predictions.jsonl").read_text().splitlines()) == 16
    assert "test_loss" in capsys.readouterr().out
