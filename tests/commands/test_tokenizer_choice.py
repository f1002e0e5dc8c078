import shutil

import pytest
import yaml

from qlora_lightning.cli import main


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path, monkeypatch):
    """Run `fit` for no step at all on rows, with or without a tokenizer; gives the config of the run folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_base)
    shutil.copytree(tiny_base, tmp_path / "other")
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 1, "enable_progress_bar": False}
    trainer["default_root_dir"] = "run"

    def run(**data):
        config = {"model": {"base": "tiny"}, "data": {"train": rows_file.name, **data}, "trainer": trainer}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        assert main(["fit", "--config", "c.yaml"]) == 0
        return yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["tokenizer"]

    return run


def test_a_tokenizer_that_is_named_is_used_and_saved_with_the_config(fit, tmp_path):
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# mine #}")
    assert fit(tokenizer="other") == "other"
    assert "mine" in (tmp_path / "run" / "adapter" / "chat_template.jinja").read_text()


def test_the_bases_own_is_taken_without_one_and_not_written_down(fit):
    assert fit() is None
