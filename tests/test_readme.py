"""Every command and every piece of Python in the README runs, on the real SmolLM2, in the order in which it stands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    """The commands of ours, each without the installation before it."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line.rpartition("&& ")[2] for line in lines if "qlora-lightning" in line]


def test_the_yaml_that_the_readme_shows_is_the_quickstart():
    (shown,) = blocks("yaml")
    sentence, _, config = (ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8").partition("\n")
    assert sentence.startswith("# ")
    assert shown == config


def test_ci_runs_the_readmes_test_command_as_it_stands():
    (line,) = [line for line in "".join(blocks("bash")).splitlines() if line.endswith("&& pytest")]
    wanted = line.replace("pip install", "pip install -q")
    assert wanted in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_commands_and_python_run_in_the_order_in_which_they_stand(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(arguments, **settings):
        done = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True, **settings)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    said = {line: run(line.split()) for line in commands()}
    first = next(iter(said.values()))
    base, adapter = map(float, re.search(r"│ loss\s+│\s*([\d.]+) │\s*([\d.]+) │", first).groups())
    assert adapter <= base / 4
    loading = blocks("python")[0]
    assert loading.strip() in first  # what the run prints last is what the README shows
    for number, block in enumerate(blocks("python")):
        (tmp_path / f"block_{number}.py").write_text(block, encoding="utf-8")
        run([sys.executable, "-c", f"import block_{number}"])
