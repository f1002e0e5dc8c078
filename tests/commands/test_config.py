"""Configs: their files are found and checked, keys are known, short forms are read, and help can be followed."""

import copy
import json
import typing

import pytest
import yaml
from lightning import Trainer

from qlora_lightning.cli import COMMANDS, main
from qlora_lightning.commands.config import (
    CALLBACK_KEYS,
    expand_arguments,
    expand_config,
    find_configs,
    read_configs,
    refuse_moved_run,
    shorten_config,
)
from qlora_lightning.commands.training import EXAMPLES, QLoRACLI
from qlora_lightning.commands.training import main as train
from qlora_lightning.support.errors import UserError

# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("fit --config a.yaml --model.rank 4", ["a.yaml"]),
        ("fit -c a.yaml --config=b.yaml", ["a.yaml", "b.yaml"]),
        ('fit --config {"model":{}}', []),
        ("fit --config", []),
        ("fit --model.rank 4", []),
    ],
)
def test_configs_are_found_as_they_were_typed(typed, found):
    assert find_configs(typed.split()) == found


def test_a_folder_is_no_config_and_a_run_folder_names_its_own(tmp_path):
    with pytest.raises(UserError, match=rf"--config {tmp_path} is a folder: name a YAML file\."):
        read_configs(["fit", "--config", str(tmp_path)])
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=rf"is a folder: name {tmp_path}/config\.yaml\."):
        read_configs(["fit", f"--config={tmp_path}"])


@pytest.mark.parametrize("command", ["fit", "plan", "evaluate", "sweep-rank", "inspect"])
def test_every_command_says_that_a_config_does_not_exist(command, capsys):
    assert main([command, "--config", "nowhere.yaml"]) == 2
    assert "--config nowhere.yaml: no such file" in capsys.readouterr().err


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A run of `runs/old`, which is now in `runs/new`."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/new"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_config.json").write_text("{}")
    (folder / "config.yaml").write_text("trainer: {default_root_dir: runs/old}\nmodel: {base: tiny}\n")
    return folder


def check_moved(name, run_folder):
    refuse_moved_run(read_configs(["--config", name]), run_folder)


def test_a_run_that_was_moved_or_is_seen_from_another_folder_is_rejected(moved, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"belongs to the run in runs/new, but has .*: runs/old, .*_dir runs/new`"):
        check_moved("runs/new/config.yaml", "runs/old")
    moved.rename(tmp_path / "runs/old")
    check_moved("runs/old/config.yaml", "runs/old")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"_dir \.\./runs/old`"):
        check_moved("../runs/old/config.yaml", "runs/old")


def test_a_named_folder_a_link_and_a_config_of_no_run_pass(moved, tmp_path):
    check_moved("runs/new/config.yaml", "runs/new")
    (moved / "other.yaml").write_text("trainer: {default_root_dir: runs/old}")
    check_moved("runs/new/other.yaml", "runs/old")
    (tmp_path / "runs/old").symlink_to(moved)
    check_moved("runs/new/config.yaml", "runs/old")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "evaluate", "sweep-rank"])
def test_commands_reject_a_moved_run_and_make_nothing(moved, tmp_path, command, capsys):
    assert main([command, "--config", "runs/new/config.yaml"]) == 2
    assert "the run was moved" in capsys.readouterr().err
    assert not (tmp_path / "runs/old").exists()


# ---- keys ------------------------------------------------------------------------------------------------------------

GOOD = "model: {base: tiny}\ndata: {train: rows.jsonl}\n"


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (GOOD + "trainer: {max_epoch: 3}\n", "", "'trainer.max_epoch'. Did you mean trainer.max_epochs? (in c.yaml)"),
        (GOOD + "gpu_memroy: {}\n", "", "'gpu_memroy'. Did you mean gpu_memory? (in c.yaml)"),
        (GOOD, "--throughput.enable true", "'throughput.enable'. Did you mean throughput.enabled? (on the command"),
        (GOOD, "--modle.rank 3", "'modle'. Did you mean model?"),
        (GOOD, "--data.zzz 1", "'data.zzz'. Keys are data.train, data.val, "),
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
    assert "model: Problem with given class_path 'nowhere.Mine'; No module named 'nowhere'" in capsys.readouterr().err


# ---- short forms -----------------------------------------------------------------------------------------------------

DEFAULTS = {"model": "qlora_lightning.QLoRAModule", "data": "qlora_lightning.InstructionDataModule"}


@pytest.mark.parametrize("config", [None, 3, "text", ["a"], {}, {"model": {"rank": 8}}, {"gpu_memory": {}}])
def test_what_needs_no_expansion_is_left_alone(config):
    assert expand_config(copy.deepcopy(config)) == config


@pytest.mark.parametrize("key", CALLBACK_KEYS)
@pytest.mark.parametrize(("value", "enabled"), [(None, False), (False, False), (True, True)])
def test_null_and_false_switch_a_callback_off(key, value, enabled):
    assert expand_config({key: value}) == {key: {"enabled": enabled}}


@pytest.mark.parametrize(
    ("arguments", "expanded"),
    [
        ("--gpu_memory null", ["--gpu_memory.enabled=false"]),
        ("--throughput=False", ["--throughput.enabled=false"]),
        ("--gradient_checkpointing true", ["--gradient_checkpointing.enabled=true"]),
        ('--gpu_memory {"enabled":false}', ['--gpu_memory={"enabled":false}']),
        ("--gpu_memory.enabled false", ["--gpu_memory.enabled", "false"]),
        ("--model.learning_rate -1e-3 --model.rank 8", ["--model.learning_rate=-1e-3", "--model.rank", "8"]),
        ("--data.system a=b null", ["--data.system", "a=b", "null"]),
    ],
)
def test_callbacks_are_switched_on_the_command_line(arguments, expanded):
    assert expand_arguments(arguments.split()) == expanded


def test_the_saved_config_is_flat_and_names_only_other_classes():
    config = {
        "seed_everything": 1,
        "model": {"class_path": DEFAULTS["model"], "init_args": {"base": "b", "rank": 8}},
        "data": {"class_path": "mine.Data", "init_args": {"train": "t"}},
    }
    short = shorten_config(copy.deepcopy(config), DEFAULTS)
    assert short == {
        "seed_everything": 1,
        "model": {"base": "b", "rank": 8},
        "data": {"class_path": "mine.Data", "train": "t"},
    }
    assert expand_config(short)["data"] == config["data"]


LIMITS = ("limit_train_batches", "limit_val_batches", "overfit_batches", "val_check_interval")


class Parsed(QLoRACLI):
    """Parses, and prints what it found."""

    def instantiate_classes(self):
        settings = self.config["fit"]["trainer"]
        print([settings[name] for name in LIMITS])
        raise KeyboardInterrupt


@pytest.mark.parametrize("order", [(int, float), (float, int)], ids=["int first", "float first"])
@pytest.mark.parametrize(("given", "read"), [("1", "1"), ("1.0", "1.0"), ("0.25", "0.25")])
def test_one_is_a_batch_and_one_point_nought_all_of_them(order, given, read, capsys, monkeypatch):
    for name in LIMITS:  # which order typing gives the Trainer's annotations depends on earlier imports
        monkeypatch.setitem(Trainer.__init__.__annotations__, name, typing.Union[(*order, type(None))])
    options = [option for name in LIMITS for option in (f"--trainer.{name}", given)]
    with pytest.raises(KeyboardInterrupt):
        train(["fit", "--config", "configs/quickstart.yaml", *options], Parsed)
    assert capsys.readouterr().out.splitlines()[-1] == f"[{', '.join([read] * len(LIMITS))}]"


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
