import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def torture(base, *arguments):
    command = [sys.executable, "-m", "tests.stress", "--base", base, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_a_run_killed_twice_ends_as_one_in_peace(tiny_base):
    done = torture(tiny_base, "--kills", "2", "--settings", "one")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "| 1 process | 2 |" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["one", "two", "stream"])
def test_runs_killed_five_times_end_as_ones_in_peace(tiny_base, setting):
    done = torture(tiny_base, "--kills", "5", "--seed", "1", "--settings", setting)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
