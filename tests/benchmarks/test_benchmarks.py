"""A tiny run of all measurements, what quantizing takes, and the tables of the study."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from tests.benchmarks import study
from tests.benchmarks.child import ROOT, run_child
from tests.processes import run_python


def test_the_page_shows_the_tables_of_the_study(tmp_path: Path) -> None:
    page = (ROOT / "configs" / "study.md").read_text(encoding="utf-8")
    lines = study.read(ROOT / "tests" / "benchmarks" / "study.jsonl")
    assert [table for table in study.format_tables(lines) if table not in page] == []
    study.draw(lines, tmp_path / "study.svg")
    assert all(task in (tmp_path / "study.svg").read_text(encoding="utf-8") for task in study.TASKS)


@pytest.mark.slow
def test_tiny_run_writes_table_and_json(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    options = ["--base", tiny_base, "--rows", "4", "--repeats", "1", "--threads", "1", "--json", tmp_path / "all.json"]
    without_peer = ["--without-peer"] * (importlib.util.find_spec("trl") is None)
    done = run_python("-m", "tests.benchmarks", rows_file, *options, *without_peer, cwd=ROOT)
    content = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert {row["unit"] for row in content["rows"]} >= {"tokens/s", "peak memory, GB", "seconds"}
    assert all(row["ours"] > 0 and (row["peer"] or 1) > 0 for row in content["rows"])
    assert len({run["tokens"] for run in content["runs"]}) == 1  # both sides, in each setting
    assert "peak memory" in done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_quantizing_needs_no_more_private_memory_than_the_result_and_one_gibibyte(tmp_path: Path) -> None:
    """One of the 32 layers of Llama-3.1-8B's shape, with its whole embedding and head: the largest tensors."""
    threads = os.cpu_count() or 1
    found = run_child("one_batch.quantize", threads, folder=str(tmp_path / "base"), layers=1)
    step = run_child("one_batch.measure", threads, base=str(tmp_path / "base"), lengths=[16, 16], dtype="auto")
    assert found["first_private_bytes"] <= found["quantized_bytes"] + 1024**3
    # mapped, not read: what is private then are imports, and what the first load left behind
    assert found["second_private_bytes"] <= found["quantized_bytes"] / 2
    assert step["private_bytes"] < step["together_bytes"]  # nothing of the cached base is private
