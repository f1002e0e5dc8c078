"""What a resume by the command line makes of a folder; that it ends as a run that never stopped: ``distributed/``."""

import json

from tests import equality

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


def test_the_command_line_beats_the_config_and_what_differs_is_printed(command, tmp_path, write_config):
    changed = ("--model.learning_rate", 0.125, "--model.weight_decay", 0.5, "--evaluation", "null")
    out = command("fit", *LONGER, *changed, config=write_config(model={"learning_rate": 0.5}))
    assert equality.metrics(tmp_path / "run", "learning_rate")[-1] == 0.125
    differing = out.split("Settings that differ")[1].split("\n\n")[0]
    found = [line.strip() for line in differing.splitlines() if "model." in line and "→" in line]
    assert found == ["model.learning_rate: 0.01 → 0.125", "model.weight_decay: 0.0 → 0.5"]
    checkpoint = equality.read_checkpoint(tmp_path / "run")
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == 0.5
    assert "hyper_parameters" not in checkpoint  # it would beat the command line
