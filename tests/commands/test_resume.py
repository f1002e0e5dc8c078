"""What a resume by the command line makes of a folder; that it ends as a run that never stopped: ``distributed/``."""

import csv
import json
import shutil

import pytest
import yaml

from qlora_lightning.cli import main
from tests import equality
from tests.commands.conftest import CONFIG

NEW = ("--trainer.default_root_dir", "new")
LAST = ("--ckpt_path", "last")
LONGER = (*LAST, "--trainer.max_epochs", 2)


def test_a_finished_run_continues_to_the_same_end_and_says_what_is_set_otherwise(command, tmp_path):
    out = command("fit", *LONGER, "--evaluation", "null")
    assert "trainer.max_epochs: 1 → 2" in out
    assert equality.differences(tmp_path / "run", tmp_path / "whole") == []
    assert not (tmp_path / "run" / "evaluation.json").exists()  # it was of the adapter before


def test_last_starts_fresh_in_a_folder_that_a_kill_left_before_the_first_save(command, tmp_path):
    """A requeued job needs one command, whatever the kill left behind."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.csv").write_text("step,train_loss\n0,9.0\n1,8.0\n")
    assert "starts fresh" in command("fit", *LAST, *NEW, "--trainer.max_steps", 1)
    assert "9.0\n" not in (tmp_path / "new" / "metrics.csv").read_text()
    assert (tmp_path / "new" / "checkpoints" / "last.ckpt").exists()


def test_a_finished_run_is_not_resumed_without_its_validation_and_the_advice_works(command, tmp_path):
    before = equality.adapter_bytes(tmp_path / "run")
    out = command("fit", *LAST, "--data.val", "null", "--evaluation", "null", code=2)
    assert "data.val: rows → null. Put that back as it was" in out
    command("fit", *LAST, "--evaluation", "null")
    assert equality.adapter_bytes(tmp_path / "run") == before


def test_a_run_that_was_killed_in_its_evaluation_is_finished_by_a_resume(command, tmp_path):
    run = tmp_path / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    (run / "evaluation.json").unlink()
    command("fit", *LAST)
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
    assert json.loads((run / "evaluation.json").read_text())["metrics"] == evaluation["metrics"]


@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory):
    """A run of two steps whose rank and learning rate were on the command line."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(finished, folder, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run", "whole"))
    model = {name: value for name, value in CONFIG["model"].items() if name not in ("rank", "learning_rate")}
    (folder / "few.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = "fit --config few.yaml --trainer.max_steps 2 --model.rank 3 --model.learning_rate 0.25"
        assert main(words.split()) == 0
    return folder


def test_the_command_line_beats_the_config_which_beats_the_checkpoint_and_what_differs_is_printed(
    stopped, tmp_path, monkeypatch, capsys
):
    shutil.copytree(stopped, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    config = yaml.safe_load((tmp_path / "few.yaml").read_text())
    (tmp_path / "few.yaml").write_text(yaml.safe_dump({**config, "model": {**config["model"], "learning_rate": 0.5}}))
    changed = ["--trainer.max_steps=3", "--model.learning_rate=0.125", "--model.weight_decay=0.5"]
    assert main(["fit", "--config", "few.yaml", *LAST, *changed]) == 0
    with open("run/metrics.csv", newline="") as handle:
        assert float([row["learning_rate"] for row in csv.DictReader(handle) if row["learning_rate"]][2]) == 0.125
    differing = capsys.readouterr().out.split("Settings that differ")[1].split("\n\n")[0]
    assert "trainer.max_steps: 2 → 3" in differing
    found = [line.strip() for line in differing.splitlines() if "model." in line and "→" in line]
    assert found == ["model.learning_rate: 0.25 → 0.125", "model.weight_decay: 0.0 → 0.5"]
    checkpoint = equality.read_checkpoint(tmp_path / "run")
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == 0.5
    assert checkpoint["qlora_lightning"]["settings"]["rank"] == 3  # of the checkpoint
    assert "hyper_parameters" not in checkpoint  # it would beat the command line
