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
@pytest.mark.parametrize("setting", ["one", "two", "stream"])
def test_runs_killed_five_times_end_as_ones_in_peace(tiny_base, setting):
    done = torture(tiny_base, "--kills", "5", "--seed", "1", "--settings", setting)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_what_differs_is_named(tmp_path, tiny_base):
    """The comparison itself can fail: a run of another seed is told apart."""
    code = (
        "import sys; from pathlib import Path; from tests.stress import lives\n"
        "folder = Path(sys.argv[1]); folder.mkdir(); lives._write_rows(folder); one = lives.SETTINGS['one']\n"
        "lives._live(one, sys.argv[2], folder, 'a')\n"
        "plain = lives._config; lives._config = lambda *args: plain(*args) | {'seed_everything': 4}\n"
        "lives._live(one, sys.argv[2], folder, 'b')\n"
        "print(lives.compare(folder / 'a', folder / 'b'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs"), str(tiny_base)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    for part in ("state_dict", "optimizer_states", "metrics.csv", "adapter_model.safetensors"):
        assert part in done.stdout
