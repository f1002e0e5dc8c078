"""What a resume by the command line makes of a folder, and that what is set otherwise then counts.

That it ends as a run that never stopped, wherever it was stopped: ``tests/distributed/test_resume.py``.
"""

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


def test_other_rows_count_if_that_is_said_and_the_runs_config_does_not_say_it_again(command, tmp_path, read_metrics):
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join([*rows[1:], rows[0]]))
    out = command("fit", *LONGER, config="run/config.yaml", code=2)
    assert "other training samples (16 there, 16 here" in out
    assert "--data.accept_changed_data true" in out
    command("fit", *LONGER, "--data.accept_changed_data", "true", config="run/config.yaml")
    assert "accept_changed_data" not in (tmp_path / "run" / "config.yaml").read_text()
    assert len(read_metrics("run", "train_loss")) == 6


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


@pytest.mark.parametrize(
    ("in_config", "arguments", "told", "rate", "weight_decay"),
    [
        ({}, "", [], 0.25, 0.0),
        (
            {"learning_rate": 0.5},
            "--model.learning_rate 0.125 --model.weight_decay 0.5",
            ["model.learning_rate: 0.25 → 0.125", "model.weight_decay: 0.0 → 0.5"],
            0.125,
            0.5,
        ),
    ],
    ids=["neither", "both"],
)
def test_the_command_line_beats_the_config_which_beats_the_checkpoint_and_what_differs_is_printed(
    stopped, tmp_path, monkeypatch, capsys, in_config, arguments, told, rate, weight_decay
):
    shutil.copytree(stopped, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    config = yaml.safe_load((tmp_path / "few.yaml").read_text())
    (tmp_path / "few.yaml").write_text(yaml.safe_dump({**config, "model": {**config["model"], **in_config}}))
    assert main(["fit", "--config", "few.yaml", *LAST, "--trainer.max_steps", "3", *arguments.split()]) == 0
    with open("run/metrics.csv", newline="") as handle:
        assert float([row["learning_rate"] for row in csv.DictReader(handle) if row["learning_rate"]][2]) == rate
    differing = capsys.readouterr().out.split("Settings that differ")[1].split("\n\n")[0]
    assert "trainer.max_steps: 2 → 3" in differing
    assert [line.strip() for line in differing.splitlines() if "model." in line and "→" in line] == told
    checkpoint = equality.read_checkpoint(tmp_path / "run")
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == weight_decay
    assert checkpoint["qlora_lightning"]["settings"]["rank"] == 3
    assert "hyper_parameters" not in checkpoint  # it would beat the command line


def test_early_stopping_counts_on_in_a_resumed_run_and_says_why(command, tmp_path, write_config):
    # No loss falls by 100: of the validations after the first, the second one without progress stops the run.
    settings = {"monitor": "val_loss", "patience": 2, "min_delta": 100.0}
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": settings}
    trainer = {"callbacks": [stopping], "limit_train_batches": 2, "accumulate_grad_batches": 1}
    config, rest = write_config(trainer=trainer), (*NEW, "--evaluation", "null")
    command("fit", *rest, "--trainer.max_epochs", 2, config=config)
    why = "Monitored metric val_loss did not improve in the last 2 records."
    out = command("fit", *rest, *LAST, "--trainer.max_epochs", 4, config=config)
    assert f"Stopped early, at step 6: {why}" in out
    assert equality.read_checkpoint(tmp_path / "new")["global_step"] == 6
    manifest = tmp_path / "new" / "manifest.json"
    assert json.loads(manifest.read_text())["stopped_early"].startswith(why)
    assert why in (tmp_path / "new" / "report.html").read_text()
