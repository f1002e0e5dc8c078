"""What a resume by the command line makes of a folder; that it ends as a run that never stopped: ``distributed/``."""

import json
import os
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from qlora_lightning.cli import main
from tests import equality
from tests.errors import MachineFailed

NEW = ("--trainer.default_root_dir", "new")
LAST = ("--ckpt_path", "last")
LONGER = (*LAST, "--trainer.max_epochs", 2)


def test_a_finished_run_continues_to_the_same_end_and_says_what_is_set_otherwise(command, tmp_path):
    out = command("fit", *LONGER, "--evaluation", "null")
    assert "trainer.max_epochs: 1 → 2" in out
    assert equality.differences(tmp_path / "run", tmp_path / "whole") == []
    assert not (tmp_path / "run" / "evaluation.json").exists()  # it was of the adapter before


@pytest.mark.slow
def test_max_steps_alone_lifts_the_limit_of_one_epoch_also_of_a_run_folders_config(command, tmp_path):
    longer = ("fit", *LAST, "--trainer.max_steps", 4, "--evaluation", "null")
    command(*longer, config=tmp_path / "run" / "config.yaml")
    assert equality.read_checkpoint(tmp_path / "run")["global_step"] == 4  # an epoch has three
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["max_epochs"] is None


@pytest.mark.slow
def test_a_moved_run_is_resumed_and_judged_where_it_is(command, tmp_path, write_config, capsys):
    """On the rows that its first seed held out."""
    held_out = write_config(data={"val": None, "val_fraction": 0.25}, evaluation={"enabled": False})
    command("fit", *NEW, config=held_out)
    (tmp_path / "new").rename(tmp_path / "moved")
    config = tmp_path / "moved" / "config.yaml"
    out = command("fit", *LONGER, "--seed_everything", 8, config=config)
    assert "seed_everything is 8, but the checkpoint's 3 rules" in out
    assert not (tmp_path / "new").exists()
    assert equality.read_checkpoint(tmp_path / "moved")["global_step"] == 6
    stored = yaml.safe_load(config.read_text())
    assert (stored["seed_everything"], stored["trainer"]["default_root_dir"]) == (3, str(tmp_path / "moved"))
    out = command("validate", config=config)
    assert f"Adapter: {tmp_path / 'moved' / 'adapter'}" in out
    assert main(["evaluate", "--adapter", str(tmp_path / "moved" / "adapter")]) == 0
    assert "Warning" not in out + capsys.readouterr().out
    for name in ("validate", "evaluate"):
        assert "Warning: the rows that are held out now" in command(name, "--seed_everything", 8, config=config)
    capsys.readouterr()
    assert main(["validate", *map(str, NEW), "--config", str(config)]) == 0  # an option beats the file behind it
    assert "evaluates the base alone" in capsys.readouterr().out
    (tmp_path / "moved" / "manifest.json").write_text('{"name": "another program"}')
    config.write_text(config.read_text().replace(str(tmp_path / "moved"), "new"))
    assert f"Adapter: {tmp_path / 'moved' / 'adapter'}" in command("validate", config=config)
    (tmp_path / "moved" / "adapter" / "qlora_lightning.json").unlink()
    assert "evaluates the base alone" in command("validate", config=config)


@pytest.mark.slow
def test_without_a_seed_the_one_that_held_rows_out_is_recorded(command, tmp_path, write_config):
    held_out = write_config(data={"val": None, "val_fraction": 0.25}, evaluation={"enabled": False})
    command("fit", *NEW, "--seed_everything", "false", "--trainer.max_steps", 1, config=held_out)
    assert "Warning" not in command("validate", config=tmp_path / "new" / "config.yaml")


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
    assert "data.val: rows → null. Change them back" in out
    command("fit", *LAST, "--evaluation", "null")
    assert equality.adapter_bytes(tmp_path / "run") == before


def card_of(run):
    return ModelCard.load(run / "adapter" / "README.md")


def test_a_run_that_was_killed_in_its_evaluation_is_finished_by_a_resume(command, tmp_path, monkeypatch):
    finish = ("fit", *LAST, "--trainer.max_steps", "3")  # all of them: Lightning's loop does not begin
    run, replace, card = tmp_path / "run", os.replace, card_of(tmp_path / "run")
    evaluation = json.loads((run / "evaluation.json").read_text())
    expected, card.data.eval_results, card.data.model_name = card.data.eval_results, None, None
    (run / "adapter" / "README.md").write_text(str(card))
    (run / "evaluation.json").unlink()

    def die(one, other):
        if Path(other).name in ("README.md", "evaluation.json"):
            names.append(Path(other).name)
            if len(names) == 2:
                raise MachineFailed
        replace(one, other)

    names = []
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", die)
        with pytest.raises(MachineFailed):
            main([*finish, "--config", "c.yaml"])
    command(*finish)
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
    assert json.loads((run / "evaluation.json").read_text())["metrics"] == evaluation["metrics"]
    assert card_of(run).data.eval_results == expected


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
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [group["initial_lr"]] == [0.125]
    assert "hyper_parameters" not in checkpoint  # it would beat the command line
