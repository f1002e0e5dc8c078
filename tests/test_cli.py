"""The program: its help, its exit codes, its one line for an error, and the files that commands write."""

import errno
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import yaml

import qlora_lightning
from qlora_lightning import cli
from qlora_lightning.cli import COMMANDS, main
from qlora_lightning.commands.options import check_output, write_output
from qlora_lightning.support.errors import UserError


def python(code):
    """Run code in a fresh interpreter, with warnings as errors."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_importing_is_silent_and_leaves_no_trace():
    code = """
import logging, os, sys, warnings
before = (list(warnings.filters), dict(os.environ), list(sys.path), list(logging.root.handlers))
import qlora_lightning
assert before == (list(warnings.filters), dict(os.environ), list(sys.path), list(logging.root.handlers))
assert not logging.getLogger("qlora_lightning").handlers
print({"torch", "lightning", "transformers", "peft", "bitsandbytes"} & set(sys.modules))
"""
    done = python(code)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_every_public_name_is_found():
    assert all(getattr(qlora_lightning, name) is not None for name in qlora_lightning.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = qlora_lightning.Nothing


def test_help_lists_every_command_in_a_line_each_and_imports_nothing_heavy():
    done = python("""
import sys
from qlora_lightning.cli import main
main(["--help"])
print("heavy:", {"torch", "lightning", "transformers", "jsonargparse", "numpy"} & set(sys.modules))
""")
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "heavy: set()"
    for name, (_, text) in COMMANDS.items():
        assert sum(line.split() == [name, *text.split()] for line in lines) == 1
    assert max(map(len, lines)) <= 100


def test_the_program_is_installed_and_runs_as_a_module():
    scripts = {script.name: script.value for script in importlib.metadata.entry_points(group="console_scripts")}
    assert scripts["qlora-lightning"] == "qlora_lightning.cli:main"
    done = subprocess.run([sys.executable, "-m", "qlora_lightning", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"qlora-lightning {qlora_lightning.__version__}\n")


@pytest.mark.parametrize(
    ("command", "hint"),
    [("fti", "Did you mean 'fit'?"), ("vaildate", "Did you mean 'validate'?"), ("zzz", "Commands are ")],
)
def test_an_unknown_command_gets_the_nearest(command, hint, capsys):
    assert main([command, "--config", "x.yaml"]) == 2
    assert capsys.readouterr().err.startswith(f"qlora-lightning: {command!r} is not a command. {hint}")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("a sentence."), 2, "qlora-lightning: a sentence.\n"),
        (KeyboardInterrupt(), 130, "qlora-lightning: interrupted.\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "run/x"),
            2,
            "qlora-lightning: run/x: permission denied. Choose another path.\n",
        ),
    ],
)
def test_mistakes_and_interrupts_have_exit_codes_and_no_traceback(raised, code, said, monkeypatch, capsys):
    def fail(arguments):
        raise raised

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["fit"]) == code
    assert capsys.readouterr() == ("", said)


def test_any_other_error_is_a_line_and_debug_shows_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", lambda arguments: 1 // 0)
    assert main(["fit"]) == 1
    assert capsys.readouterr().err.startswith("qlora-lightning: ZeroDivisionError: ")
    with pytest.raises(ZeroDivisionError):
        main(["fit", "--debug"])


def test_a_user_mistake_in_a_real_process_has_code_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "qlora_lightning", "fit", "--config", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("qlora-lightning: --config none.yaml: no such file")
    assert done.stderr.count("\n") == 1


def test_figures_on_standard_output_can_be_piped(tiny_base):
    command = f"plan --config configs/quickstart.yaml --model.base {tiny_base} --json -"
    done = subprocess.run(
        [sys.executable, "-m", "qlora_lightning", *command.split()], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["memory"]["parts"]["base"] > 0
    assert "Memory of a step" in done.stderr


def test_a_file_that_exists_is_kept_without_force(tmp_path):
    file = tmp_path / "a.json"
    assert check_output("--json", None) is None
    write_output(check_output("--json", file), {"a": 1})
    with pytest.raises(UserError, match=r"a\.json exists already.*--force"):
        check_output("--json", file)
    write_output(check_output("--json", file, force=True), {"a": 2})
    assert json.loads(file.read_text()) == {"a": 2}


@pytest.mark.parametrize(("name", "message"), [(".", "is a folder"), ("none/a.json", "does not exist or cannot be")])
def test_what_cannot_be_written_is_rejected_before_any_work(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        check_output("--json", name)


def test_classes_of_the_current_folder_are_found_by_an_installed_command(tiny_base, rows_file, tmp_path):
    code = "from qlora_lightning import QLoRAModule\n\n\nclass Smooth(QLoRAModule):\n    pass\n"
    (tmp_path / "mine.py").write_text(code)
    config = {"model": {"class_path": "mine.Smooth", "base": str(tiny_base)}, "data": {"train": str(rows_file)}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-P", "-m", "qlora_lightning", "plan", "--config", "c.yaml"]  # -P: as what pip installs
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Memory of a step" in done.stdout
