import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_runs_killed_five_times_end_as_ones_in_peace(tiny_base, processes):
    options = ["--base", tiny_base, "--kills", "5", "--seed", "1", "--processes", str(processes)]
    command = [sys.executable, "-m", "tests.stress", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
