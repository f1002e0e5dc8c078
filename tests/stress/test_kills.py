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


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["one", "two"])
def test_runs_killed_five_times_end_as_ones_in_peace(tiny_base, setting):
    done = torture(tiny_base, "--kills", "5", "--seed", "1", "--settings", setting)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
