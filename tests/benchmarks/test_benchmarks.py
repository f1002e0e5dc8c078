import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_lightning.model.batch import shape_of_batch
from qlora_lightning.support.errors import UserError
from tests.benchmarks.figures import Figures

ROOT = Path(__file__).resolve().parents[2]


def run_benchmarks(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_our_side_alone_gives_the_whole_table_and_json(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    options = ("--rows", "4", "--repeats", "1", "--threads", "1", "--without-peer", "--json", file)

    done = run_benchmarks(rows_file, "--base", tiny_base, *options)

    assert done.returncode == 0, done.stderr
    assert "ours, gradient checkpointing, run 1 of 1" in done.stdout
    assert "tokens/s, every 2nd layer checkpointed" in done.stdout
    summary = json.loads(file.read_text(encoding="utf-8"))
    assert summary.keys() == {"setup", "complete", "rows", "machine", "runs", "scaling", "llama_8b"}
    assert summary["complete"] is True
    assert summary["setup"]["rows"] == 4
    rows = {row["what"]: row for row in summary["rows"]}
    for title in ("tokens/s, plain", "peak RSS, checkpointed (GB)", "share of ceiling, validation", "second start (s)"):
        assert title in done.stdout
        assert rows[title]["ours"] > 0
        assert rows[title]["peer"] is rows[title]["ratio"] is None
    (plain,), (checkpointing,) = summary["runs"]["plain"]["ours"], summary["runs"]["checkpointing"]["ours"]
    assert len(plain["losses"]) == 1  # four rows are one batch
    assert plain["tokens"] == checkpointing["tokens"] == plain["validation"]["tokens"]
    flop, with_again = (
        {part: found["flop"] for part, found in run["ceiling"]["parts"].items()} for run in (plain, checkpointing)
    )
    again = {part: with_again.pop(part) for part in list(with_again) if part.endswith(" again")}
    assert flop == with_again
    assert again["attention again"] == flop["attention"] / 3  # two of six products
    assert 0 < again["base again"] < flop["base"]


@pytest.mark.slow
def test_sizes_are_measured_in_short_rows_and_in_one(tiny_base: Path) -> None:
    from tests.benchmarks.scaling import measure_scaling

    said: list[str] = []
    sizes = list(measure_scaling(str(tiny_base), "cpu", 1, "fp32", said.append, tokens=(300,)))

    assert [(size["rows"], size["tokens"]) for size in sizes] == [("short", 300), ("long", 300)]
    assert all(size["tokens_per_second"] > 0 for size in sizes)
    assert len(said) == 2


def test_batch_of_random_tokens_has_rows_of_the_length_asked_for() -> None:
    from tests.benchmarks.one_batch import random_batch

    batch = shape_of_batch(random_batch(500, 200))
    assert (batch.lengths, batch.labelled, batch.computed) == (
        (200, 200, 100),
        250,
        497,
    )  # nothing follows the last tokens


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


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command in this process; each run of a side is what the test says, an error or figures."""
    from tests.benchmarks.__main__ import main

    def run(*arguments: str | Path, runs: Sequence[Figures | Exception] = ()) -> int:
        left = list(runs)

        def measure(*_: Any) -> Any:
            if isinstance(left[0], Exception):
                raise left[0]
            return left.pop(0)

        monkeypatch.setattr("tests.benchmarks.sides.Side.measure", measure)
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments), "--without-peer"])
        return main()

    return run


def test_what_would_fail_at_the_end_is_refused_before_anything_is_measured(
    main: Callable[..., int], rows_file: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    (tmp_path / "photo.png").write_bytes(b"a photo")
    (tmp_path / "no_answer.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    base = ("--base", tiny_base)
    for arguments, message in (
        ((rows_file, *base, "--json", tmp_path), f"--json {tmp_path}: that is a folder; name a file"),
        ((rows_file, *base, "--json", rows_file), "rows.jsonl"),
        ((rows_file, *base, "--json", tmp_path / "no_answer.jsonl"), "was not written by this command"),
        ((rows_file, *base, "--plot", tmp_path / "photo.png"), "was not written by this command"),
        ((rows_file, *base, "--json", tmp_path / "x.svg", "--plot", tmp_path / "x.svg"), "both name"),
        ((rows_file, *base, "--json", tmp_path / "no" / "x.json"), "there is no folder"),
        ((rows_file, *base, "--plot", tmp_path / "x.abc"), "x.abc: expected a name that ends in one of"),
        ((rows_file, *base, "--plot", tmp_path / "x"), "x: expected a name that ends in one of"),
        ((rows_file, *base, "--llama-8b", rows_file), "expected a folder, found a file"),
        ((rows_file, *base, "--llama-8b", tmp_path / "folder"), "an empty folder, found notes.txt"),
        ((rows_file, *base, "--llama-8b", tiny_base), "expected num_hidden_layers 32, found 2; name another folder"),
        ((tmp_path / "none.jsonl", *base), "none.jsonl does not exist"),
        ((tmp_path / "no_answer.jsonl", *base), "no_answer.jsonl:1: no assistant turn"),
        ((rows_file, "--base", tmp_path / "none"), "none"),
    ):
        assert main(*arguments, runs=[AssertionError("it measures")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_layers_of_no_base_are_refused(main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("--llama-8b-layers", "2")
    assert "of which base? Name it by --llama-8b FOLDER" in capsys.readouterr().err


def test_every_run_is_kept_when_a_later_one_fails(
    main: Callable[..., int], rows_file: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    figures = Figures(1200, 4.0, 2 << 30, 6.0, [1.5, 1.4], {"torch": "1"})
    arguments = (rows_file, "--base", tiny_base, "--json", file)

    assert main(*arguments, runs=[*[figures] * 3, RuntimeError("ours failed")]) == 1

    kept = json.loads(file.read_text())
    assert {name: len(kept["runs"][name].get("ours", [])) for name in ("plain", "checkpointing")} == {
        "plain": 1,
        "checkpointing": 1,
    }
    assert (kept["complete"], kept["rows"]) == (False, [])
    assert main(*arguments, runs=[*[figures] * 5, RuntimeError("ours failed")]) == 1
    kept = json.loads(file.read_text())
    assert {"what": "tokens/s, plain", "ours": 300.0}.items() <= kept["rows"][0].items()
    assert "tokens/s, plain" in capsys.readouterr().out


def test_interpreter_that_does_not_exist_is_refused_in_a_sentence(rows_file: Path, tiny_base: Path) -> None:
    done = run_benchmarks(rows_file, "--base", tiny_base, "--peer-python", "/nowhere/python")

    assert done.returncode == 2
    assert done.stderr == "--peer-python: /nowhere/python cannot be run: No such file or directory.\n"


def test_sides_that_train_on_different_tokens_are_not_compared() -> None:
    from rich.console import Console

    from tests.benchmarks.measure import Measured, measure_sides

    class OfTokens:
        accelerator = "gpu"  # beside busy loops it runs on a CPU alone

        def __init__(self, name: str, tokens: int) -> None:
            self.name, self.tokens = name, tokens

        def measure(self, *options: str) -> Figures:
            return Figures(self.tokens, 4.0, 2 << 30, 6.0, [1.5, 1.4], {"torch": "1"})

    def run(peers_tokens: int) -> int:
        sides: Any = [OfTokens("ours", 1058), OfTokens("peer", peers_tokens)]
        return len(list(measure_sides(sides, 1, Measured(), Console(quiet=True))))

    assert run(1058) == 5
    with pytest.raises(UserError, match=r"different tokens of the same rows \(ours 1,058 and peer 546\)"):
        run(546)


def test_what_is_no_interpreter_is_told() -> None:
    from tests.benchmarks.children import run_child

    with pytest.raises(RuntimeError, match=r"peer ended without figures\. Is /bin/echo an interpreter of Python\?"):
        run_child("/bin/echo", "peer", [], 1)
