import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_benchmarks(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_our_side_alone_gives_a_table_and_json(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"

    done = run_benchmarks(rows_file, "--rows", "4", "--base", tiny_base, "--without-peer", "--json", file)

    assert done.returncode == 0, done.stderr
    for title in ("tokens/s", "peak RSS (GiB)", "first loss", "last loss"):
        assert title in done.stdout
    assert "ours, run 1 of 1" in done.stdout
    summary = json.loads(file.read_text(encoding="utf-8"))
    assert summary.keys() == {"setup", "sides", "ratios", "machine", "runs"}
    assert summary["setup"]["rows"] == 4
    assert summary["sides"].keys() == {"ours"}
    ours = summary["sides"]["ours"]
    assert ours.keys() == {"tokens", "tokens_per_second", "peak_rss_gib", "first_loss", "last_loss"}
    assert all(value > 0 for value in ours.values())
    assert summary["machine"].keys() == {"cpu", "cores", "versions", "date"}
    (run,) = summary["runs"]["ours"]
    assert len(run["losses"]) == 1  # four rows are one batch
    assert run["tokens"] == ours["tokens"]


def test_peer_reads_the_rows_in_the_order_in_which_ours_trains(
    rows_file: Path, smollm2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_lightning import InstructionDataModule
    from tests.benchmarks import settings
    from tests.benchmarks.rows import order_as_trained, read_pairs, write_pairs

    monkeypatch.setenv("PL_GLOBAL_SEED", str(settings.SEED))  # as seed_everything does
    pairs = read_pairs(str(rows_file), 16)
    file = tmp_path / "ours.jsonl"
    write_pairs(pairs, file)
    data = InstructionDataModule(train=str(file), batch_size=4, tokenizer=str(smollm2_folder), train_on="last")
    data.setup("fit")

    order = [row_id for batch in data.train_dataloader() for row_id in batch["row_ids"].tolist()]

    assert [pairs[row_id] for row_id in order] == order_as_trained(pairs)


def test_interpreter_that_does_not_exist_is_refused_in_a_sentence(rows_file: Path, tiny_base: Path) -> None:
    done = run_benchmarks(rows_file, "--base", tiny_base, "--peer-python", "/nowhere/python")

    assert done.returncode == 2
    assert done.stderr == "--peer-python: /nowhere/python cannot be run: No such file or directory.\n"


def test_ratios_are_of_medians() -> None:
    from tests.benchmarks.figures import Figures
    from tests.benchmarks.report import summarize

    ours = [Figures(1200, seconds, 2.0, [1.5, 1.4], {"torch": "1"}) for seconds in (3.0, 2.0, 9.0)]
    peer = [Figures(1200, seconds, 8.0, [1.5, 1.4], {"torch": "2", "trl": "3"}) for seconds in (12.0, 9.0, 20.0)]

    summary = summarize({"ours": ours, "peer": peer}, {})

    assert summary["ratios"] == {"tokens_per_second": 4.0, "peak_rss_gib": 0.25}
    assert summary["machine"]["versions"] == {"torch": "1", "the peer's torch": "2", "trl": "3"}
