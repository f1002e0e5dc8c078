import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lightning import QLoRAModule

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_both_sides_answer_the_same_prompts_and_in_float32_alike(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    module = QLoRAModule(base=str(tiny_base), compute_dtype="fp32")
    module.configure_model()
    module.save_adapter(tmp_path / "adapter")
    options = ["--base", tiny_base, "--adapter", tmp_path / "adapter", "--rows", "4", "--max-new-tokens", "5"]
    command = [sys.executable, "-m", "tests.benchmarks.generation", rows_file, *options, "--threads", "1"]
    command += ["--dtype", "float32", "--json", tmp_path / "f.json"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    assert found.keys() == {"adapter", "base"}
    assert all(side["plain"] > 0 and side["ours"] > 0 for side in found.values())
    assert "4 rows of" in done.stdout
