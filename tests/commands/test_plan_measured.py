"""What is planned beside what a run takes, each in a process of its own, on the real SmolLM2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
