"""`fit`, `validate`, `test` and `predict` on a config: what the run folder then holds, and what counts as its run."""

import json
import os
import shlex
import shutil
from datetime import date

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from qlora_lightning.report import read_metrics
from tests.adapters import make_adapter
from tests.equality import adapter_bytes, contents, metrics, read_adapter
from tests.processes import run_python


def read_config(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_a_fit_fills_its_run_folder_whose_manifest_names_a_command_that_repeats_it(command, tmp_path):
    run = tmp_path / "run"
    names = {file.name for file in run.iterdir()}
    assert {"config.yaml", "metrics.csv", "manifest.json", "report.html", "checkpoints", "adapter"} <= names
    logged = read_metrics(run / "metrics.csv")
    assert [step for step, _ in logged["train_loss"]] == [1, 2, 3]
    assert all(speed > 0 for _, speed in logged["tokens_per_second"])
    private, peak = (logged[name][0][1] for name in ("private_memory_gib", "peak_rss_gib"))
    assert 0.1 < private < peak
    config = read_config(run)
    assert (config["model"]["rank"], config["trainer"]["gradient_clip_val"]) == (2, 1.0)
    assert "class_path" not in config["model"]
    assert config["data"]["tokenizer"] is None  # it follows the base
    first = json.loads((run / "manifest.json").read_text())
    assert first["command"] == "qlora-lightning fit --config c.yaml"
    program, verb, *arguments = shlex.split(first["reproduce"])
    assert program == "qlora-lightning"
    out = command(verb, *arguments[2:], config=arguments[1])
    assert "By exact match, the adapter is better on" in out
    assert "Memory after loading" in out
    assert "100% of the batches" not in out
    again = json.loads((tmp_path / "run-again" / "manifest.json").read_text())
    assert adapter_bytes(tmp_path / "run-again") == adapter_bytes(run)
    assert all(again[part] == first[part] for part in ("base", "data", "packages"))
    assert again["metrics"]["val_loss"] == first["metrics"]["val_loss"]
    config["trainer"]["default_root_dir"] = "run-again"
    assert read_config(tmp_path / "run-again") == config


def test_the_run_folders_config_serves_validate_test_and_predict_which_change_no_file_of_it(command, tmp_path):
    before, config = contents(tmp_path / "run"), "run/config.yaml"
    out = command("validate", config=config)
    assert "Adapter: run/adapter" in out
    assert f"{metrics(tmp_path / 'run', 'val_loss')[-1]:.4f}"[:6] in out
    out = command("test", config=config)
    assert all(name in out for name in ("Adapter: run/adapter", "test_loss", "test_perplexity", "test_token_accuracy"))
    assert contents(tmp_path / "run") == before
    assert "2 predictions: run/predictions.jsonl" in command("predict", config=config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reference"]) for line in lines] == [(0, "one"), (1, None)]
    assert all(isinstance(line["prediction"], str) for line in lines)


def test_checkpoint_and_adapter_folder_are_evaluated_alike_and_without_either_the_base(command):
    def loss(text):
        return next(line.split("│")[2] for line in text.splitlines() if "val_loss" in line)

    folder = command("validate")
    checkpoint = command("validate", "--ckpt_path", "last")
    assert "Adapter:" not in checkpoint
    base = command("validate", "--trainer.default_root_dir", "null")  # as Lightning's own configs have it
    assert "this evaluates the base alone" in base
    assert loss(folder) == loss(checkpoint) != loss(base)


def test_null_and_false_switch_callbacks_off_in_yaml_and_as_options(command, write_config, tmp_path, monkeypatch):
    """In a folder of the home folder, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = write_config(trainer={"max_steps": 1, "limit_val_batches": 0}, throughput=False)
    switches = ("--gpu_memory", "null", "--evaluation=False", "--gradient_checkpointing", "true")
    switches += ("--adapter_checkpoint", "null")
    out = command("fit", *switches, "--trainer.default_root_dir", "~/off", config=config)
    assert "Memory after loading" not in out
    assert "chat --adapter" not in out + (tmp_path / "off" / "report.html").read_text()  # there is none to talk to
    progress = json.loads((tmp_path / "off" / "manifest.json").read_text())["progress"]
    assert (progress["tokens"], progress["labelled_tokens"]) == (None, None)
    stored = read_config(tmp_path / "off")
    assert [stored[key]["enabled"] for key in ("evaluation", "gradient_checkpointing")] == [False, True]
    assert not {"private_memory_gib", "tokens_seen"} & read_metrics(tmp_path / "off" / "metrics.csv").keys()


def test_a_trial_run_leaves_a_finished_run_alone(command, tmp_path):
    before = contents(tmp_path / "run")
    command("fit", "--trainer.fast_dev_run", "true")
    command("predict", "--trainer.fast_dev_run", "true")
    assert contents(tmp_path / "run") == before


def test_an_adapter_folder_is_trained_further_by_its_key(command, tmp_path):
    unmoved = ("--trainer.max_steps", "1", "--model.learning_rate", "1e-15")
    command("fit", "--model.adapter", "run", "--trainer.default_root_dir", "further", *unmoved)
    first, second = (read_adapter(tmp_path / name) for name in ("run", "further"))
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-12) for name in first | second)
    again = {"config": "further/config.yaml"}
    assert "Adapter: further/adapter" in command("validate", **again)  # and not the one it began with
    assert "Adapter:" not in command("validate", "--model.adapter", "run", **again)


@pytest.fixture
def further(command, tmp_path, write_config):
    """Train an adapter of another shape than the config's further, into ``further``."""
    make_adapter(tmp_path / "other", "tiny", rank=4, alpha=12, target_modules="attention", layers=[1])
    at_default = {"rank": 8, "dropout": 0.0, "compute_dtype": "fp32"}
    config = write_config(model=at_default, evaluation={"enabled": False}, trainer={"max_steps": 1})
    command("fit", "--model.adapter", "other", "--trainer.default_root_dir", "further", config=config)
    return tmp_path / "further"


def test_the_run_folder_records_the_shape_of_the_adapter_that_is_trained_further(command, further):
    manifest = json.loads((further / "manifest.json").read_text())
    checkpoint = torch.load(further / "checkpoints" / "last.ckpt", weights_only=True)
    shape = {"rank": 4, "alpha": 12, "dropout": 0.0, "layers": [1], "lora_options": None, "target_experts": False}
    shape["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config, stored = read_config(further), checkpoint["qlora_lightning"]["settings"]
    for settings in (config["model"], manifest["config"]["model"], stored):
        assert {name: settings[name] for name in shape} == shape
    command("plan", config="further/config.yaml")
    for verb in ("fit", "plan"):
        options = ("--model.adapter", "run", "--trainer.default_root_dir", "third")
        assert "model.rank is 4" in command(verb, *options, config="further/config.yaml", code=2)


@pytest.mark.slow
def test_the_config_of_a_run_that_trained_an_adapter_further_runs_again(command, further, tmp_path):
    again = {"config": "further/config.yaml"}
    command("fit", "--trainer.default_root_dir", "again", **again)
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(further)
    assert read_config(tmp_path / "again")["model"] == read_config(further)["model"]
    assert "model.rank" not in command("fit", "--ckpt_path", "last", "--trainer.max_steps", 2, **again)
    for verb, option in (("validate", "--model.adapter"), ("evaluate", "--adapter")):
        command(verb, **again)
        command(verb, option, "run", **again)  # of another shape: it is not trained


def test_tokenizer_template_and_its_options_follow_the_adapter(command, tmp_path, write_config):
    shutil.copytree(tmp_path / "tiny", tmp_path / "dated")
    template = tmp_path / "dated" / "chat_template.jinja"
    dated = "{%- set today = strftime_now('%d %b %Y') %}{{- today + (motto | default('')) }}"
    template.write_text(dated + template.read_text())
    # a date, which YAML knows without quotes
    data = {"tokenizer": "dated", "template_options": {"motto": date(2026, 11, 27)}}
    options = ("--trainer.default_root_dir", "new", "--trainer.max_steps", 1, "--evaluation", "null")
    command("fit", *options, config=write_config(data=data))
    assert read_config(tmp_path / "new")["data"]["tokenizer"] == "dated"
    plain = AutoTokenizer.from_pretrained(tmp_path / "new" / "adapter")
    question = [{"role": "user", "content": "What day is it?"}]
    prompt = plain.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("26 Jul 20242026-11-27<|im_start|>system\n")


OWN = """
import torch
import peft
from qlora_lightning import QLoRAModule, load_base


class Own(QLoRAModule):
    def build_model(self):
        base = load_base(self.base, compute_dtype=torch.float32).model
        return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # of transformers, asked by PEFT 0.21
def test_a_subclass_with_a_build_model_of_its_own_is_trained_and_evaluated(command, write_config, tmp_path):
    (tmp_path / "own_modules.py").write_text(OWN)
    model = {"class_path": "own_modules.Own", "dropout": 0.0, "compute_dtype": "fp32", "learning_rate": 0.03}
    config = write_config(model=model, evaluation={"rows": 0}, trainer={"default_root_dir": "own"})
    command("fit", config=config)
    trained = metrics(tmp_path / "own", "val_loss")[-1]
    assert read_config(tmp_path / "own")["model"]["class_path"] == "own_modules.Own"
    validated = command("validate", config=config)
    loss = float(next(line.split("│")[2] for line in validated.splitlines() if "val_loss" in line))
    assert loss == pytest.approx(trained, rel=1e-5)
    command("evaluate", "--json", "found.json", config=config)
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]["loss"]
    assert found["adapter"]["value"] == pytest.approx(trained, rel=1e-5)
    assert found["difference"]["value"] != 0.0


@pytest.mark.slow
def test_a_fit_without_a_step_fails_but_not_a_resume_that_has_nothing_left(command, tmp_path):
    no_time = ("--trainer.max_time", "00:00:00:00")
    out = command("fit", *no_time, "--trainer.default_root_dir", "new", code=1)
    assert "took no step: trainer.max_time" in out
    assert not (tmp_path / "new" / "adapter").exists()
    command("fit", *no_time, "--ckpt_path", "last", "--evaluation", "null")


OFFLINE = """
import socket

asked = []

def refuse(*args, **kwargs):
    asked.append(args[-1] if args else kwargs)
    raise OSError("no network here")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse

from qlora_lightning.cli import main

for line in ("fit --ckpt_path last --trainer.max_epochs 2", "validate", "predict"):
    assert main([*line.split(), "--config", "c.yaml"]) == 0
assert asked == [], asked
"""


@pytest.mark.slow
@pytest.mark.usefixtures("command")
def test_no_network_is_asked_if_no_hub_id_is_named(tmp_path):
    hidden = ("HF_HUB_OFFLINE", "USE_HUB_KERNELS")
    online = {name: value for name, value in os.environ.items() if name not in hidden}
    run_python("-c", OFFLINE, env={**online, "HF_HOME": str(tmp_path / "hub")})
