"""The table's arithmetic by hand-made figures, products counted by hand, and one tiny run of all."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import communication
from tests.benchmarks.ceiling import count_products
from tests.benchmarks.child import ROOT, run_child
from tests.benchmarks.table import BUSY, PLAIN, Row, make_rows

RUN = {"side": "ours", "setting": PLAIN, "tokens": 1200, "start_seconds": 5.5}


def test_rows_are_medians_of_each_side_and_shares_of_ours() -> None:
    runs = [RUN | {"seconds": seconds, "peak_bytes": 2e9} for seconds in (3.0, 2.0, 9.0)]
    runs += [RUN | {"side": "peer", "seconds": seconds, "peak_bytes": 8e9} for seconds in (12.0, 9.0, 20.0)]
    runs[0] |= {"ceiling_share": 0.75}
    runs.append(RUN | {"setting": BUSY, "seconds": 6.0})
    one_batch = {"side": "ours", "tokens": 512, "seconds": 8.0, "step_private_bytes": 51_200_000}
    runs.append(one_batch | {"setting": "512 tokens"})

    rows = make_rows(runs)

    assert rows == [
        Row("tokens/s", PLAIN, 400.0, 100.0),
        Row("tokens/s", BUSY, 200.0),
        Row("tokens/s", "512 tokens", 64.0),
        Row("share of idle speed", BUSY, 0.5),
        Row("share of ceiling", PLAIN, 0.75),
        Row("peak memory, GB", PLAIN, 2.0, 8.0),
        Row("kB a token", "512 tokens", 100.0),
        Row("seconds", "second start", 5.5, 5.5),
    ]
    assert (rows[0].ratio, rows[1].ratio) == (4.0, None)


# A LLaMA of two layers: 4 wide, 2 heads of 2 over 1, 6 inner, 10 words, rank 1; and a batch of five tokens
CONFIG = {"hidden_size": 4, "intermediate_size": 6, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIG |= {"vocab_size": 10, "num_hidden_layers": 2}
WEIGHTS = 16 + 8 + 8 + 16 + 24 + 24 + 24  # of one layer's q, k, v, o, gate, up and down
ENDS = 8 + 6 + 6 + 8 + 10 + 10 + 10  # their inputs and outputs
BY_TOKEN = 2 * 5  # a multiplication and an addition for each of five tokens
TILES = 2 * 2 * 2 * (64 * 64 + 64 * 64)  # one product of attention: two heads, two wide; each sample fills a tile
HEAD = 2 * 2 * 4 * 10  # two labelled tokens
ENTRY = BY_TOKEN * (32 + 3 * 4)  # q, k and v of the lowest layer pass nothing on
TRAINED = 2 * HEAD + 2 * (2 * BY_TOKEN * WEIGHTS + 3 * BY_TOKEN * ENDS + 6 * TILES) - ENTRY
AGAIN = BY_TOKEN * (WEIGHTS - 24 + ENDS - 10) + 2 * TILES  # all of a layer but down, whose result nothing needs


@pytest.mark.parametrize(("checkpointing", "flop"), [(False, TRAINED), (True, TRAINED + 2 * AGAIN)])
def test_ceiling_has_the_products_counted_by_hand(checkpointing: bool, flop: int) -> None:
    products = count_products(CONFIG, 1, (3, 2), (0, 0), 2, checkpointing)
    by_product = {each: 2 * each.batch * each.rows * each.inner * each.columns for each in products}
    assert sum(count * by_product[each] for each, count in products.items()) == flop


@pytest.mark.slow
def test_tiny_run_writes_table_json_and_plot(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    files = ["--json", tmp_path / "all.json", "--plot", tmp_path / "all.png"]
    options = ["--base", tiny_base, "--rows", "4", "--repeats", "1", "--threads", "1", *files]
    without_peer = ["--without-peer"] * (importlib.util.find_spec("trl") is None)
    command = [sys.executable, "-m", "tests.benchmarks", rows_file, *options, *without_peer]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert {row["unit"] for row in content["rows"]} >= {"tokens/s", "share of ceiling", "peak memory, GB", "seconds"}
    assert all(row["ours"] > 0 and (row["peer"] or 1) > 0 for row in content["rows"])
    assert len({run["tokens"] for run in content["runs"]}) == 1  # both sides, in each setting
    assert "share of ceiling" in done.stdout
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quantizing_needs_no_more_private_memory_than_the_result_and_one_gibibyte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the 32 layers of Llama-3.1-8B's shape, with its whole embedding and head: the largest tensors."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    threads = os.cpu_count() or 1

    found = run_child("one_batch", threads, folder=str(tmp_path / "base"), layers=2)
    step = run_child("one_batch", threads, base=str(tmp_path / "base"), lengths=[16, 16], dtype="auto", ceilings=1)

    assert found["first_private_bytes"] <= found["quantized_bytes"] + 1024**3
    # mapped, not read: what is private then are imports, and what the first load left behind
    assert found["second_private_bytes"] <= found["quantized_bytes"] / 2
    assert step["private_bytes"] < step["together_bytes"]  # nothing of the cached base is private
    assert step["ceiling_share"] > 0


def test_the_page_on_several_devices_shows_the_calculated_table() -> None:
    assert "\n".join(communication.table()) in (ROOT / "tests" / "benchmarks" / "README.md").read_text(encoding="utf-8")
