import pytest

from qlora_lightning.cli import main
from qlora_lightning.commands.config_files import check_configs, find_configs
from qlora_lightning.support.errors import UserError


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("fit --config a.yaml --model.rank 4", ["a.yaml"]),
        ("fit -c a.yaml --config=b.yaml", ["a.yaml", "b.yaml"]),
        ("fit --config --config", ["--config"]),
        ("fit --config", []),
        ("fit --model.rank 4", []),
    ],
)
def test_configs_are_found_as_they_were_typed(typed, found):
    assert find_configs(typed.split()) == found


def test_what_is_there_or_no_name_of_a_file_passes(tmp_path):
    (tmp_path / "a.yaml").touch()
    check_configs(["fit", "--config", str(tmp_path / "a.yaml"), "--config", '{"model": {"base": "a"}}' + " " * 5000])


def test_a_folder_is_no_config_and_a_run_folder_names_its_own(tmp_path):
    with pytest.raises(UserError, match=rf"--config names {tmp_path}, which is a folder: name a YAML file\."):
        check_configs(["fit", "--config", str(tmp_path)])
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=rf"is a folder: name {tmp_path}/config\.yaml\."):
        check_configs(["fit", f"--config={tmp_path}"])


@pytest.mark.parametrize("command", ["fit", "plan", "evaluate", "sweep-rank", "inspect"])
def test_a_config_that_is_not_there_is_told_by_every_command(command, capsys):
    assert main([command, "--config", "nowhere.yaml"]) == 2
    assert "--config names nowhere.yaml, but there is no such file" in capsys.readouterr().err
