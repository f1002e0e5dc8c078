import shutil
from pathlib import Path

import pytest
import yaml

from qlora_lightning.cli import main
from tests.processes import run_python
from tests.random_base import save_family

ROOT = Path(__file__).parents[2]
FAMILIES = {"gemma-4-e2b": "gemma4", "mistral-7b": "mistral", "phi-4": "phi3", "qwen3-4b": "qwen3"}
FAMILIES |= {"qwen3.5-9b": "qwen3_5", "qwen3-30b-a3b": "qwen3_moe", "gpt-oss-20b": "gpt_oss"}
FAMILIES |= {"lfm2.5-1.2b": "lfm2"}
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("script", sorted((ROOT / "configs").rglob("make_data.py")), ids=lambda file: file.parent.name)
def test_running_a_script_again_writes_the_committed_bytes(script, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    again = tmp_path / script.relative_to(ROOT)
    for name in ("train.jsonl", "val.jsonl"):
        (again.parent / name).unlink()
    run_python(again)
    for name in ("train.jsonl", "val.jsonl"):
        assert (again.parent / name).read_bytes() == (script.parent / name).read_bytes()


QUICK = ("llama-3.1-8b",)
RECIPES = [pytest.param(each, id=each.stem, marks=[] if each.stem in QUICK else pytest.mark.slow) for each in CONFIGS]


@pytest.mark.parametrize("config", RECIPES)
def test_each_config_begins_with_a_sentence_and_runs_for_a_step(config, tiny_base, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.read_text().startswith("# ")
    settings = yaml.safe_load(config.read_text())
    train = settings["data"]["train"]
    path = train["path"] if isinstance(train, dict) else train
    assert path.startswith(("data/", f"configs/{config.stem}/"))

    family = FAMILIES.get(config.stem)
    base = save_family(tmp_path / family, family, tiny_base) if family else tiny_base
    own = config.with_suffix("") / "train.jsonl"  # of another task than the usual rows
    rows = own if "preferences" in config.stem else rows_file
    # what this machine does not have: the base, the data, the devices
    options = [f"--model.base={base}", f"--data.train={rows}", f"--data.val={rows}", "--trainer.accelerator=cpu"]
    options += ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.enable_progress_bar=false"]
    options += ["--trainer.max_steps=1", "--trainer.val_check_interval=1.0", "--trainer.limit_val_batches=2"]
    options += ["--data.template_options={}"]  # of a template that the tiny base does not have
    options += ["--evaluation.max_new_tokens=4"]  # random weights stop nowhere
    assert main(["fit", "--config", str(config), *options]) == 0

    run = Path(settings["trainer"]["default_root_dir"])
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert len((run / "metrics.csv").read_text().splitlines()) > 1
