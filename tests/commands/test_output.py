"""Files that commands write: --json FILE whole or not at all, - to standard output, nothing lost without --force."""

import json
import subprocess
import sys

import pytest

from qlora_lightning.commands.options import confirm
from qlora_lightning.commands.output import check_output, write_json
from qlora_lightning.support.errors import UserError


def test_a_file_that_exists_is_kept_without_force(tmp_path):
    file = tmp_path / "a.json"
    assert check_output("--json", None) is None
    write_json(check_output("--json", file), {"a": 1})
    with pytest.raises(UserError, match=r"a\.json exists already.*--force"):
        check_output("--json", file)
    write_json(check_output("--json", file, force=True), {"a": 2})
    assert json.loads(file.read_text()) == {"a": 2}


@pytest.mark.parametrize(("name", "message"), [(".", "is a folder"), ("none/a.json", "does not exist or cannot be")])
def test_what_cannot_be_written_is_rejected_before_any_work(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        check_output("--json", name)


def test_figures_on_standard_output_can_be_piped():
    command = "plan --config configs/quickstart.yaml --json -"
    done = subprocess.run(
        [sys.executable, "-m", "qlora_lightning", *command.split()], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["memory"]["peak_bytes"] > 0
    assert "Memory of a step" in done.stderr


@pytest.mark.parametrize(("answer", "said"), [("y", True), (" YES ", True), ("", False), ("n", False), ("yep", False)])
def test_only_a_yes_is_a_yes(answer, said, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert confirm("Remove it?", "cache clear") is said


def test_without_a_terminal_nobody_can_say_yes(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(UserError, match="Add --yes"):
        confirm("Remove it?", "cache clear")
