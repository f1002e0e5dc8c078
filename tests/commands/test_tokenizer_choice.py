import shutil
from datetime import date

import pytest
import yaml
from transformers import AutoTokenizer

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


def test_a_fixed_date_and_template_options_follow_the_adapter_everywhere(fit, tmp_path, capsys):
    template = tmp_path / "tiny-dated"
    shutil.copytree(tmp_path / "other", template)
    text = (template / "chat_template.jinja").read_text()
    (template / "chat_template.jinja").write_text(
        "{%- set today = strftime_now('%d %b %Y') %}{{- today + (motto | default('')) }}" + text
    )
    fit(tokenizer="tiny-dated", template_options={"motto": date(2026, 11, 27)})  # in YAML without quotes
    question = [{"role": "user", "content": "What day is it?"}]
    plain = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    prompt = plain.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("26 Jul 20242026-11-27<|im_start|>system\n")
    capsys.readouterr()
    common = ["--adapter", "run/adapter", "--data.val", "rows.jsonl", "--rows", "2", "--max-new-tokens", "2"]
    assert main(["evaluate", *common]) == 0  # with the config of the run
    (tmp_path / "run" / "config.yaml").unlink()
    assert main(["evaluate", *common]) == 0  # with the adapter folder alone
    assert "Warning" not in capsys.readouterr().out
    assert main(["evaluate", *common, "--data.template_options.motto", "Be rude."]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "another chat template, so" in out
    assert "set data.chat_template and data.template_options as in its training" in out
    assert main(["evaluate", *common, "--data.template_options.moto", "Be rude."]) == 2
    assert "has no variable 'moto', its variables: motto. Did you mean 'motto'?" in capsys.readouterr().err
