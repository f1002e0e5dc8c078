import subprocess

import torch

from qlora_lightning.report.environment import git_state, package_versions, processor_name


def git(folder, *arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_versions_are_those_installed():
    versions = package_versions()
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # only one may say +cu132
    assert {"peft", "transformers", "bitsandbytes", "lightning"} <= versions.keys()


def test_git_tells_commit_branch_and_changes(tmp_path):
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q", "-b", "work")
    assert git_state(tmp_path) is None  # nothing is committed yet
    (tmp_path / "a.txt").write_text("1")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-qm", "one")
    state = git_state(tmp_path)
    assert (len(state["commit"]), state["branch"], state["dirty"]) == (40, "work", False)
    (tmp_path / "new.txt").write_text("not of the repository")
    assert not git_state(tmp_path)["dirty"]
    (tmp_path / "a.txt").write_text("2")
    assert git_state(tmp_path)["dirty"]


def test_without_git_there_is_no_state(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_the_processor_has_a_name():
    assert processor_name().strip()
