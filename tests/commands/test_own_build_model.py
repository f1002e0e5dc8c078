"""Commands on a module whose ``build_model`` makes the adapter by itself."""

import csv
import json

import pytest
import yaml

from qlora_lightning.cli import main

MODULE = """
import peft
import torch
from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.lora import add_adapters
from qlora_lightning.model.base_model import load_base
from qlora_lightning.support.versions import without_peft_warnings


class Own(QLoRAModule):
    def build_model(self):
        return add_adapters(load_base(self.base, compute_dtype=torch.float32).model, rank=4)


class Other(QLoRAModule):
    def build_model(self):
        base = load_base(self.base, compute_dtype=torch.float32).model
        with without_peft_warnings():
            return peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM"))


class Heeding(QLoRAModule):
    def build_model(self):
        return add_adapters(load_base(self.base, compute_dtype=torch.float32).model, **self.adapter_options)
"""
CONFIG = {
    "model": {"class_path": "own_modules.Own", "base": "tiny", "compute_dtype": "fp32", "learning_rate": 0.03},
    "data": {"train": "rows.jsonl", "val": "rows.jsonl", "batch_size": 4},
    "evaluation": {"rows": 0},
    "trainer": {"accelerator": "cpu", "max_steps": 4, "enable_progress_bar": False, "default_root_dir": "run"},
}


@pytest.fixture
def run(tiny_base, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "own_modules.py").write_text(MODULE)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))

    def run(command, *arguments, code=0):
        capsys.readouterr()
        assert main([command, "--config", "config.yaml", *arguments]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


def trained_loss():
    with open("run/metrics.csv") as file:
        return [float(line["val_loss"]) for line in csv.DictReader(file) if line.get("val_loss")][-1]


def validated_loss(out):
    words = out.split()
    return float(words[words.index("val_loss") + 2])


@pytest.mark.parametrize("kind", ["Own", "Other"])  # LoRA, and an adapter of another kind
def test_validate_and_evaluate_use_what_was_trained(kind, run, tmp_path):
    named = ("--model", f"own_modules.{kind}")
    run("fit", *named)
    assert validated_loss(run("validate", *named)) == pytest.approx(trained_loss(), rel=1e-5)
    if kind == "Own":
        run("evaluate", "--json", "found.json")
        found = json.loads((tmp_path / "found.json").read_text())["metrics"]["loss"]
        assert found["adapter"]["value"] == pytest.approx(trained_loss(), rel=1e-5)
        assert found["difference"]["value"] < -0.1


def test_an_adapter_that_does_not_fit_what_is_built_is_rejected(run):
    run("fit", "--model", "own_modules.Heeding", "--model.rank", "2")
    assert "does not fit the adapter of this model" in run("validate", code=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "2,4"], "A trial of model.rank 2 would train rank 4: build_model of Own"),
        (["--target-modules", "attention,mlp"], "A trial of model.target_modules attention would train target modules"),
    ],
)
def test_a_sweep_rejects_a_trial_that_would_train_something_else(arguments, words, run, tmp_path):
    assert words in run("sweep-rank", *arguments, code=2)
    assert not list(tmp_path.glob("run/*/*/trial.json"))
