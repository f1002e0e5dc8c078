"""Commands on a module whose ``build_model`` makes the adapter by itself."""

import json

import pytest

from tests.equality import read_checkpoint

MODULE = """
import peft
import torch
from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.lora import add_adapters
from qlora_lightning.model.load.base_model import load_base
from qlora_lightning.support.versions import without_peft_warnings


class Own(QLoRAModule):
    def build_model(self):
        return add_adapters(load_base(self.base, compute_dtype=torch.float32).model, rank=4)


class Other(QLoRAModule):
    def build_model(self):
        base = load_base(self.base, compute_dtype=torch.float32).model
        with without_peft_warnings():
            return peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM"))


class Weighted(QLoRAModule):
    def __init__(self, base: str, weight: float = 1.0, **kwargs):
        super().__init__(base, **kwargs)
"""


@pytest.fixture
def config(command, write_config, tmp_path):
    """Another config, whose `build_model` is chosen by `--model own_modules.NAME`."""
    (tmp_path / "own_modules.py").write_text(MODULE)
    model = {"dropout": 0.0, "compute_dtype": "fp32", "learning_rate": 0.03}
    return write_config(model=model, evaluation={"rows": 0}, trainer={"default_root_dir": "own"})


def validated_loss(out):
    return float(next(line.split("│")[2] for line in out.splitlines() if "val_loss" in line))


@pytest.mark.parametrize("kind", ["Own", "Other"])  # LoRA, and an adapter of another kind
def test_validate_and_evaluate_use_what_was_trained(kind, command, config, read_metrics, tmp_path):
    named = ("--model", f"own_modules.{kind}")
    command("fit", *named, config=config)
    trained = float(read_metrics("own", "val_loss")[-1]["val_loss"])
    assert validated_loss(command("validate", *named, config=config)) == pytest.approx(trained, rel=1e-5)
    if kind == "Own":
        command("evaluate", *named, "--json", "found.json", config=config)
        found = json.loads((tmp_path / "found.json").read_text())["metrics"]["loss"]
        assert found["adapter"]["value"] == pytest.approx(trained, rel=1e-5)
        assert found["difference"]["value"] != 0.0


@pytest.mark.usefixtures("config")
def test_a_resume_keeps_settings_that_only_the_users_class_has(command, write_config, tmp_path):
    own = write_config(model={"class_path": "own_modules.Weighted"}, trainer={"default_root_dir": "own"})
    command("fit", "--model.weight", "3", "--model.double_quant", "false", config=own)
    out = command("fit", "--trainer.max_epochs", "2", "--ckpt_path", "last", config=own)
    assert "does not know" not in out
    assert out.replace("(there → now)", "").count("→") == 1  # of trainer.max_epochs
    settings = read_checkpoint(tmp_path / "own")["qlora_lightning"]["settings"]
    assert [settings[name] for name in ("weight", "double_quant")] == [3.0, False]


def test_a_sweep_rejects_a_trial_of_another_rank(command, config, tmp_path):
    out = command("sweep-rank", "--model", "own_modules.Own", "--ranks", "2,4", config=config, code=2)
    assert "build_model of Own ignores self.adapter_options['rank']" in out
    assert not list(tmp_path.glob("own/*/sweep.json"))
