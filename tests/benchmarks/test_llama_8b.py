import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quantizing_needs_no_more_private_memory_than_the_result_and_one_gibibyte(tmp_path):
    """Two of the 32 layers of Llama-3.1-8B's shape, with its whole embedding and head: the largest tensors."""
    sizes = ["--layers", "2", "--tokens", "32", "--ceilings", "1"]
    command = [sys.executable, "-m", "tests.benchmarks.llama_8b", str(tmp_path / "base"), *sizes]
    env = os.environ | {"QLORA_LIGHTNING_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["first_private_peak_gib"] <= figures["quantized_gib"] + 1.0
    # mapped, not read: what is private then are imports, and what the first load left behind
    assert figures["second_private_peak_gib"] <= figures["quantized_gib"] / 2
    step = figures["step"]  # from the cached base: nothing of it is private
    assert step["tokens"] == 32
    assert step["private_bytes"] < step["together_bytes"]
    assert step["ceiling"]["seconds"] > 0
