import pytest

from qlora_lightning import cli
from qlora_lightning.commands.moved_run import refuse_moved_run
from qlora_lightning.support.errors import UserError


@pytest.fixture(autouse=True)
def moved(tmp_path, monkeypatch):
    """A run of `runs/old`, which now lies in `runs/new`."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/new"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_config.json").write_text("{}")
    (folder / "config.yaml").write_text("trainer: {default_root_dir: runs/old}\nmodel: {base: tiny}\n")
    return folder


def test_a_run_that_was_moved_is_refused():
    with pytest.raises(UserError, match=r"is that of the run in runs/new, but says .*: runs/old, .*_dir runs/new`"):
        refuse_moved_run(["--config", "runs/new/config.yaml"], "runs/old")


def test_a_run_seen_from_another_folder_is_refused(moved, tmp_path, monkeypatch):
    moved.rename(tmp_path / "runs/old")
    refuse_moved_run(["--config=runs/old/config.yaml"], "runs/old")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"_dir \.\./runs/old`"):
        refuse_moved_run(["--config=../runs/old/config.yaml"], "runs/old")


@pytest.mark.parametrize("other", ["runs/new", "runs/third"])
def test_a_folder_that_the_user_names_passes(other):
    refuse_moved_run(["--config", "runs/new/config.yaml"], other)


def test_a_link_to_the_run_is_the_run(moved, tmp_path):
    (tmp_path / "runs/old").symlink_to(moved)
    refuse_moved_run(["--config", "runs/new/config.yaml"], "runs/old")


def test_a_config_that_is_no_runs_own_passes(moved):
    (moved / "other.yaml").write_text("trainer: {default_root_dir: runs/old}")
    refuse_moved_run(["--config", "runs/new/other.yaml"], "runs/old")
    (moved / "adapter/adapter_config.json").unlink()
    (moved / "checkpoints").mkdir()
    refuse_moved_run(["--config", "runs/new/config.yaml"], "runs/old")


@pytest.mark.parametrize(
    "text", ["", "[1]", "trainer: null", "trainer: {max_steps: 1}", "trainer: {default_root_dir: 1}"]
)
def test_a_config_that_names_no_folder_passes(moved, text):
    (moved / "config.yaml").write_text(text)
    refuse_moved_run(["--config", "runs/new/config.yaml"], "runs/default")


def test_a_run_in_the_home_folder_is_where_it_says(moved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (moved / "config.yaml").write_text("trainer: {default_root_dir: ~/runs/new}")
    refuse_moved_run(["--config", "runs/new/config.yaml"], "~/runs/new")
    (moved / "config.yaml").write_text("trainer: {default_root_dir: ~/runs/old}")
    with pytest.raises(UserError, match="the run was moved"):
        refuse_moved_run(["--config", "runs/new/config.yaml"], str(tmp_path / "runs/old"))


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "evaluate", "sweep-rank"])
def test_commands_refuse_it_in_a_sentence_and_make_nothing(moved, tmp_path, command, capsys):
    assert cli.main([command, "--config", "runs/new/config.yaml"]) == 2
    assert "the run was moved" in capsys.readouterr().err
    assert not (tmp_path / "runs/old").exists()
