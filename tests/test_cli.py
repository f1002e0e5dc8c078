"""The program: its help, its exit codes, its one line for an error, and the short forms of options."""

import errno
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import qlora_lightning
from qlora_lightning import cli
from qlora_lightning.cli import COMMANDS, main
from qlora_lightning.commands import config
from tests.processes import run_python


def test_importing_is_silent_and_leaves_no_trace():
    code = """
import logging, os, sys, warnings
before = (list(warnings.filters), dict(os.environ), list(sys.path), list(logging.root.handlers))
import qlora_lightning
assert before == (list(warnings.filters), dict(os.environ), list(sys.path), list(logging.root.handlers))
assert not logging.getLogger("qlora_lightning").handlers
print({"torch", "lightning", "transformers", "peft", "bitsandbytes"} & set(sys.modules))
"""
    done = run_python("-W", "error", "-c", code)
    assert (done.stdout, done.stderr) == ("set()\n", "")


SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_KERNELS = """
from unittest.mock import MagicMock

def get_kernel(*args, **options):
    print("fetched", args)

def __getattr__(name):  # whatever else transformers imports of it
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""
_SHOW = """
import importlib.util, os, sys
CODE
assert "torch._inductor.compile_fx" not in sys.modules
assert "bitsandbytes" in sys.modules
assert importlib.util.find_spec("kernels") is not None  # for whoever wants it
if "qlora_lightning.cli" not in sys.modules:
    from lightning.pytorch.strategies import StrategyRegistry
    assert not {"GOMP_SPINCOUNT", "TORCHDYNAMO_DISABLE"} & os.environ.keys()
    assert "ddp_sharded" not in StrategyRegistry.available_strategies()
"""


@pytest.mark.parametrize(
    ("code", "spins"),
    [
        ("from qlora_lightning.cli import main; main(['fit', '--print_config'])", "10000"),
        pytest.param("from qlora_lightning import ShardedDDPStrategy, QLoRAModule", None, marks=pytest.mark.slow),
    ],
)
def test_no_way_in_imports_the_compiler_or_fetches_code_and_only_the_command_sets_anything(tmp_path, code, spins):
    (tmp_path / "kernels.py").write_text(_KERNELS)
    environment = {name: value for name, value in os.environ.items() if name not in SPINNING}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    shown = run_python("-c", _SHOW.replace("CODE", code), env=environment | {"OMP_DISPLAY_ENV": "verbose"})
    assert "fetched" not in shown.stdout
    if spins is None:
        assert shown.stdout == ""
    elif sys.platform.startswith("linux"):  # GNU's threads
        assert f"GOMP_SPINCOUNT = '{spins}'" in shown.stderr


def test_help_lists_every_command_in_a_line_each_and_imports_nothing_heavy():
    code = """
import sys
from qlora_lightning.cli import main
main(["--help"])
print("heavy:", {"torch", "lightning", "transformers", "jsonargparse", "numpy"} & set(sys.modules))
"""
    *lines, heavy = run_python("-W", "error", "-c", code).stdout.splitlines()
    assert heavy == "heavy: set()"
    for name, (_, text) in COMMANDS.items():
        assert sum(line.split() == [name, *text.split()] for line in lines) == 1
    assert max(map(len, lines)) <= 100


SHOW_HELP = """
import sys
from qlora_lightning.cli import main
try:
    main(["fit", "--help"])
except SystemExit:
    print("\\n", {"torch", "lightning", "transformers", "jsonargparse", "numpy"} & set(sys.modules), sep="")
"""
TYPOS = {  # what is typed after `fit`, or in a file, with a wrong key: what the message says
    "--model.rnk=4": "There is no key 'model.rnk'. Did you mean 'model.rank'?",
    "--model.init_args.lora_r 4": "There is no key 'model.lora_r'. Did you mean 'model.rank'?",
    "--data.batch-size 4": "There is no key 'data.batch-size'. Did you mean 'data.batch_size'?",
    "--trainer.max_step 4": "There is no key 'trainer.max_step'. Did you mean 'trainer.max_steps'?",
    "--trainer.callback+=EarlyStopping": "There is no key 'trainer.callback+'. Did you mean 'trainer.callbacks'?",
    "--gpu_memory.rows 4": "There is no key 'gpu_memory.rows'. Did you mean 'evaluation.rows'?",
    "--modle.rank 4": "There is no key 'modle.rank'. Did you mean 'model.rank'?",
    "--rank 4": "There is no key 'rank'. Did you mean 'model.rank'?",
    "--enable 4": "There is no key 'enable'.",
    "--seed 4": "There is no key 'seed'. Did you mean 'seed_everything'?",
    "model: {rnk: 4}": "There is no key 'model.rnk'. Did you mean 'model.rank'?",
    "model: {init_args: {rnk: 4}}": "There is no key 'model.rnk'. Did you mean 'model.rank'?",
    "data: {eval_file: a}": "There is no key 'data.eval_file'. Did you mean 'data.val'?",
    "trainer: {max_step: 4}": "There is no key 'trainer.max_step'. Did you mean 'trainer.max_steps'?",
    "evaluation: {row: 4}": "There is no key 'evaluation.row'. Did you mean 'evaluation.rows'?",
}


@pytest.mark.parametrize("typed", TYPOS)
def test_a_wrong_key_has_the_same_message_whoever_finds_it(typed, tmp_path, monkeypatch, capsys):
    arguments, file = ["fit", *typed.split()], tmp_path / "c.yaml"
    if ": " in typed:
        arguments = ["fit", "--config", str(file)]
        file.write_text(typed)
    for check in (config.check_keys, lambda *_: None):  # ours before slow imports, and jsonargparse
        monkeypatch.setattr(config, "check_keys", check)
        assert main(arguments) == 2
        assert f"{TYPOS[typed]} See `qlora-lightning fit --help`.\n" in capsys.readouterr().err


def listed_keys(option, capsys):
    """The keys that a help of ``fit`` lists."""
    with pytest.raises(SystemExit, match="0"):
        main(["fit", option])
    return {*re.findall(r"^ +(?:-\w.*, )?--([\w.+]+)", capsys.readouterr().out, flags=re.MULTILINE)}


def test_help_of_fit_has_our_keys_marks_those_that_matter_and_imports_no_class(capsys):
    done = run_python("-c", SHOW_HELP, env={**os.environ, "COLUMNS": "80"})
    shown, _, heavy = done.stdout.rpartition("\n\n")
    assert heavy == "set()\n"
    assert shown.count("\n") < 250  # jsonargparse has 511
    assert len(re.findall(r"(?:^  --[\w.]+ \S+|^) +\* [A-Z]", shown, flags=re.MULTILINE)) == 10
    assert "--model.rank 8                    * Rank of the update: rows of A" in shown
    ours = {key for key in config.known_keys() if not key.startswith("trainer.")} - {"model.class_path"}
    trainers = {f"trainer.{name}" for name in (*config.TRAINER_DEFAULTS, "max_epochs", "max_steps")}
    found = listed_keys("--help", capsys)
    assert ours - {"data.class_path"} | trainers | {"print_config", "help"} == found


@pytest.mark.parametrize("section", ["trainer", "evaluation", "gpu_memory"])
def test_help_of_a_section_has_its_keys_alone(section, capsys):
    known = {key for key in config.known_keys() if key.startswith(f"{section}.")}
    listed = listed_keys(f"--{section}.help", capsys)
    assert known <= listed
    assert all(key.startswith(f"{section}.") for key in listed)


def test_a_wrong_key_is_reported_before_slow_imports(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {rnk: 4}")
    code = """
import sys
from qlora_lightning.cli import main
typos = [["--model.rnk", "4"], ["--rank=4"], ["--config", "c.yaml"]]
codes = [main(["fit", *typo]) for typo in typos] + [main(["plan", "--device-memory=16GiB", *typos[0]])]
print(codes, {"torch", "lightning", "transformers", "jsonargparse", "numpy"} & set(sys.modules))
"""
    assert run_python("-c", code, cwd=tmp_path).stdout == "[2, 2, 2, 2] set()\n"


def test_no_right_key_is_rejected_before_slow_imports(capsys):
    listed = {"model.init_args.rank", "model.class_path", "trainer.callbacks+", "trainer.logger.init_args.save_dir"}
    for option in ("--help", *(f"--{section}.help" for section in config.SECTIONS)):
        listed |= listed_keys(option, capsys)
    assert {*config.known_keys()} - {"config", "data.class_path"} < listed
    for key in listed:
        section, _, name = key.partition(".")
        config.check_keys([{section: {name: 4} if name else 4}] if "help" not in key else [], [f"--{key}=4"])
    own = {"class_path": "my_code.Own", "init_args": {"kept": 4}}
    config.check_keys([{"model": own}], ["--model.kept=4", "--data=my_code.Rows", "--data.kept=4"])


def test_the_program_is_installed_and_runs_as_a_module():
    scripts = {script.name: script.value for script in importlib.metadata.entry_points(group="console_scripts")}
    assert scripts["qlora-lightning"] == "qlora_lightning.cli:main"
    done = run_python("-m", "qlora_lightning", "--version")
    assert done.stdout == f"qlora-lightning {qlora_lightning.__version__}\n"


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted.\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "x: permission denied. Choose another path.\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "[Errno 28] No space left on device. Make room, "),
        (Exception("I/O error: disk full (os error 28)"), 2, "I/O error: disk full (os error 28). Make room, or"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_has_an_exit_code_and_a_line_and_debug_shows_its_traceback(raised, code, message, monkeypatch, capsys):
    def fail(arguments):
        raise raised

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["merge"]) == code
    assert capsys.readouterr().err.startswith(f"qlora-lightning: {message}")
    if code == 1:
        with pytest.raises(ZeroDivisionError):
            main(["merge", "--debug"])
        with pytest.raises(ZeroDivisionError):  # a training shows it at once
            main(["fit"])


def test_an_installed_command_finds_classes_here_and_its_figures_can_be_piped(tiny_base, rows_file, tmp_path):
    code = "from qlora_lightning import QLoRAModule\n\n\nclass FocalLoss(QLoRAModule):\n    pass\n"
    (tmp_path / "my_code.py").write_text(code)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(re.search(r"`model: (\{class_path: .*?\})`", readme)[1])
    settings = {"model": {**shown, "base": str(tiny_base)}, "data": {"train": str(rows_file)}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    program = [sys.executable, "-P", "-m", "qlora_lightning"]  # -P: as what pip installs
    command = [*program, "plan", "--config", "c.yaml", "--json", "-"]
    ours, theirs = socket.socketpair()  # a pipe could be opened by the name /dev/stdout, too
    with ours, theirs:
        done = subprocess.run(command, cwd=tmp_path, env=env, stdout=theirs, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(ours.recv(1 << 16))["memory"]["parts"]["base"] > 0
    assert "Memory of a step" in done.stderr


LIMITS = {"limit_train_batches": "1", "limit_val_batches": "1.0", "overfit_batches": "0.25", "val_check_interval": "1"}


def test_one_is_a_batch_and_one_point_nought_all_of_them(capsys):
    options = [f"--trainer.{name}={value}" for name, value in LIMITS.items()]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "configs/quickstart.yaml", *options, "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert {name: str(shown[name]) for name in LIMITS} == LIMITS
    assert (shown["max_time"], shown["precision"]) == (None, None)  # as a text null would be a duration


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_usage_and_shows_its_examples(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: qlora-lightning {command} ")
    assert shown.count(f"qlora-lightning {command}") > 1
