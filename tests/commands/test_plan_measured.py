"""What is planned beside what a run takes, each in a process of its own: SmolLM2, and a row of 32 k tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.random_base import save_random_llama, save_tokenizer

ROOT = Path(__file__).parents[2]
QUICKSTART = ("--config", "configs/quickstart.yaml", "--trainer.max_steps", "6", "--trainer.limit_val_batches", "0")


@pytest.mark.slow
@pytest.mark.alone
def test_smollm2_takes_what_was_planned_within_a_tenth(smollm2_folder, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # one thread takes less

    def run(command, run, *arguments):
        options = [*QUICKSTART, "--trainer.default_root_dir", str(tmp_path / run), *arguments]
        command = [sys.executable, "-m", "qlora_lightning", command, *options]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("fit", "first", "--trainer.max_steps", "1")  # unpacks and quantizes; what that leaves behind is in no plan
    for checkpointing in ("false", "true"):
        options = ("--gradient_checkpointing", checkpointing)
        file = tmp_path / f"{checkpointing}.json"
        run("plan", checkpointing, *options, "--json", str(file))
        run("fit", checkpointing, *options)
        planned = json.loads(file.read_text())["memory"]
        found = json.loads((tmp_path / checkpointing / "plan.json").read_text())
        assert found["predicted"]["peak_bytes"] == pytest.approx(planned["peak_bytes"], rel=0.02)
        assert found["measured"]["peak_bytes"] == pytest.approx(planned["peak_bytes"], rel=0.1)


@pytest.mark.slow
@pytest.mark.alone
def test_a_row_of_32k_tokens_takes_no_more_than_was_planned_and_little_less(tmp_path):
    """A base whose MLP weighs and whose attention does not; not in tiles the MLP would take 2 GB more.

    On CPUs one step took 7 % and 13 % less: what stays in the heap depends on the kernels.
    """
    save_tokenizer(tmp_path, ["a b c"], size=300)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "max_position_embeddings": 65536}
    save_random_llama(tmp_path, torch.float32, num_attention_heads=1, num_key_value_heads=1, **sizes)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "a b c " * 8000}) + "\n")
    settings = {
        "model": {"base": str(tmp_path), "quantization": "none", "compute_dtype": "fp32"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 32768, "batch_size": 1, "val_fraction": None},
        "gradient_checkpointing": {"enabled": True},
        "trainer": {"accelerator": "cpu", "max_steps": 2, "default_root_dir": str(tmp_path / "run")},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "qlora_lightning", "fit", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert 30_000 < found["largest_batch"]["tokens"] <= 32_768
    assert 0.8 < found["measured"]["peak_bytes"] / found["predicted"]["peak_bytes"] < 1.1
