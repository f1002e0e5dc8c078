"""Configs: their files are found and checked, keys are known, short forms are read, and help can be followed."""

import json

import pytest
import yaml

from qlora_lightning.cli import COMMANDS, main
from qlora_lightning.commands.training import EXAMPLES, QLoRACLI

# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "plan", "evaluate", "sweep-rank", "inspect"])
def test_every_command_says_that_a_config_does_not_exist(command, capsys):
    assert main([command, "--config", "nowhere.yaml"]) == 2
    assert "--config nowhere.yaml: no such file" in capsys.readouterr().err


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A run of `runs/old`, which is now in `runs/new`."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/new"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "config.yaml").write_text("trainer: {default_root_dir: runs/old}\nmodel: {base: tiny}\n")
    return folder


@pytest.mark.parametrize("command", ["fit", "validate", "evaluate", "sweep-rank"])
def test_a_run_that_was_moved_is_rejected_and_nothing_made(moved, tmp_path, command, capsys):
    assert main([command, "--config", "runs/new/config.yaml"]) == 2
    message = capsys.readouterr().err
    assert "belongs to the run in runs/new, but has trainer.default_root_dir: runs/old, " in message
    assert "Add `--trainer.default_root_dir runs/new`" in message
    assert not (tmp_path / "runs/old").exists()
    here = ["--trainer.default_root_dir", "runs/new", "--data.val", "none.jsonl"]  # the next error
    assert main([command, "--config", "runs/new/config.yaml", *here]) == 2
    assert "was moved" not in capsys.readouterr().err


# ---- keys ------------------------------------------------------------------------------------------------------------

GOOD = "model: {base: tiny}\ndata: {train: rows.jsonl}\n"


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (GOOD + "trainer: {max_epoch: 3}\n", "", "'trainer.max_epoch'. Did you mean trainer.max_epochs? (in c.yaml)"),
        (GOOD + "gpu_memroy: {}\n", "", "'gpu_memroy'. Did you mean gpu_memory? (in c.yaml)"),
        (
            GOOD,
            "--throughput.enable true",
            "'throughput.enable'. Did you mean throughput.enabled? (on the command line)",
        ),
        (GOOD, "--modle.rank 3", "'modle'. Did you mean model?"),
        (GOOD, "--gpu_memroy null", "'gpu_memroy'. Did you mean gpu_memory?"),
        (GOOD, "--data.zzz 1", "'data.zzz'. Keys are accept_changed_data, "),
    ],
)
def test_an_unknown_key_is_rejected_with_its_place(config, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(config)
    assert main(["fit", "--config", "c.yaml", *arguments.split()]) == 2
    assert f"There is no key {message}" in capsys.readouterr().err


def test_keys_of_a_class_of_the_users_own_are_left_to_jsonargparse(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: {class_path: nowhere.Mine, depth: 3}\ndata: {train: rows.jsonl}\n")
    assert main(["fit", "--config", "c.yaml"]) == 2
    assert "model: Problem with given class_path 'nowhere.Mine'. No module named 'nowhere'" in capsys.readouterr().err


EXPRESSIONS = [(text, text) for text in ("mlp", r".*\.(q|v)_proj", r".*\.[01]{1,2}\.mlp.*")]
LIMITS = ("limit_train_batches", "limit_val_batches", "overfit_batches", "val_check_interval")


def test_one_is_a_batch_and_one_point_nought_all_of_them():
    given = dict(zip(LIMITS, ("1", "1.0", "0.25", "1"), strict=True))
    options = [f"--trainer.{name}={value}" for name, value in given.items()]
    read = QLoRACLI(["--config", "configs/quickstart.yaml", *options], with_trainer=False).config["trainer"]
    assert {name: str(read[name]) for name in LIMITS} == given


def test_names_with_commas_are_a_list_and_an_expression_stays_one():
    for typed, read in (
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        *EXPRESSIONS,
    ):
        options = ["--config", "configs/quickstart.yaml", "--model.target_modules", typed]
        model = QLoRACLI(options, with_trainer=False).config["model"]["init_args"]
        assert model["target_modules"] == read


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_usage_and_fits_80_columns_but_for_examples(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: qlora-lightning {command} ")
    if command in EXAMPLES:
        before, options = shown.split("\noptions:\n")
        assert before.endswith(f"\nexamples:\n{EXAMPLES[command]}\n")
        assert "--trainer.max_epochs" in options
    else:
        wide = [line for line in shown.splitlines() if len(line) > 80]
        assert all(line.startswith(("  qlora-lightning ", "usage: ", "       ")) for line in wide)


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
