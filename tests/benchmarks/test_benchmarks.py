"""The table's arithmetic by hand-made figures, products counted by hand, and one tiny run of all."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lightning.model.adapters.lora import add_adapters
from tests.benchmarks import communication
from tests.benchmarks.ceiling import BatchShape, count_products
from tests.benchmarks.child import ROOT, run_child
from tests.benchmarks.table import BUSY, PLAIN, Row, make_rows

RUN = {"side": "ours", "setting": PLAIN, "tokens": 1200, "start_seconds": 5.5, "import_seconds": 4.5}
STEADY = {"tokens": 1200, "seconds": 4.0, "ceiling_seconds": 3.0, "ceiling_flop": 6e9}
VALIDATION = {"tokens": 1200, "seconds": 2.0, "ceiling_seconds": 1.0, "ceiling_flop": 2e9}


def test_rows_are_medians_of_each_side_and_shares_of_ours() -> None:
    runs = [RUN | {"seconds": seconds, "peak_bytes": 2e9} for seconds in (3.0, 2.0, 9.0)]
    runs += [RUN | {"side": "peer", "seconds": seconds, "peak_bytes": 8e9} for seconds in (12.0, 9.0, 20.0)]
    runs[0] |= {"steady": STEADY, "validation": VALIDATION}
    runs.append(RUN | {"setting": BUSY, "seconds": 6.0})

    rows = make_rows(runs)

    assert rows == [
        Row("tokens/s", PLAIN, 400.0, 100.0),
        Row("tokens/s", "validation", 600.0),
        Row("tokens/s", BUSY, 200.0),
        Row("share of idle speed", BUSY, 0.5),
        Row("share of ceiling", PLAIN, 0.75),
        Row("share of ceiling", "validation", 0.5),
        Row("ceiling, tokens/s", PLAIN, 400.0),
        Row("ceiling, tokens/s", "validation", 1200.0),
        Row("ceiling, GFLOP/s", PLAIN, 2.0),
        Row("ceiling, GFLOP/s", "validation", 2.0),
        Row("peak memory, GB", PLAIN, 2.0, 8.0),
        Row("seconds", "second start", 5.5, 5.5),
        Row("seconds", "second start, of it imports", 4.5),
        Row("seconds", "second start, after the imports", 1.0),
    ]
    assert (rows[0].ratio, rows[1].ratio) == (4.0, None)


def test_rows_of_one_batch_are_its_memory() -> None:
    run = {"side": "ours", "tokens": 512, "seconds": 8.0, "step_private_bytes": 51_200_000}
    step = {"layers": 2, "start_seconds": 5.0, "together_bytes": 6e9, "private_bytes": 9e8, "mapped_bytes": 5e9}

    assert make_rows([run | {"setting": "512 tokens"}, run | step | {"setting": "8B"}]) == [
        Row("tokens/s", "512 tokens", 64.0),
        Row("tokens/s", "8B", 64.0),
        Row("peak memory, GB", "8B, private and base", 6.0),
        Row("peak memory, GB", "8B, private", 0.9),
        Row("peak memory, GB", "8B, mapped files", 5.0),
        Row("kB a token", "512 tokens", 100.0),
        Row("seconds", "8B, second start", 5.0),
    ]


# A LLaMA of two layers: 4 wide, 2 heads of 2 over 1, 6 inner, 10 words, rank 1; and a batch of five tokens
BATCH = BatchShape(attended=(3, 2), shared=(0, 0), labelled=2)
WEIGHTS = 16 + 8 + 8 + 16 + 24 + 24 + 24  # of one layer's q, k, v, o, gate, up and down
ENDS = 8 + 6 + 6 + 8 + 10 + 10 + 10  # their inputs and outputs
BY_TOKEN = 2 * 5  # a multiplication and an addition for each of five tokens
TILES = 2 * 2 * 2 * (64 * 64 + 64 * 64)  # one product of attention: two heads, two wide; each sample fills a tile
HEAD = 2 * 2 * 4 * 10  # two labelled tokens
FORWARD = 2 * (BY_TOKEN * WEIGHTS + 2 * TILES) + HEAD
ADAPTERS = BY_TOKEN * ENDS  # of one layer: forward once, backward twice
ENTRY = BY_TOKEN * (32 + 3 * 4)  # q, k and v of the lowest layer with adapters pass nothing on
VALIDATED = FORWARD + 2 * ADAPTERS
TRAINED = FORWARD + HEAD + 2 * (BY_TOKEN * WEIGHTS + 3 * ADAPTERS + 4 * TILES) - ENTRY
UPPER = FORWARD + HEAD + BY_TOKEN * WEIGHTS + 3 * ADAPTERS + 4 * TILES - ENTRY  # nothing flows below the upper layer
AGAIN = BY_TOKEN * (WEIGHTS - 24 + ENDS - 10) + 2 * TILES  # all of a layer but down, whose result nothing needs


@pytest.mark.parametrize(
    ("layers", "trains", "checkpointing", "flop"),
    [
        ("all", False, False, VALIDATED),
        ("all", True, False, TRAINED),
        ("all", True, True, TRAINED + 2 * AGAIN),
        ([1], True, True, UPPER + AGAIN),
    ],
)
def test_ceiling_has_the_products_counted_by_hand(
    layers: str | list[int], trains: bool, checkpointing: bool, flop: int
) -> None:
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    causal_lm = add_adapters(LlamaForCausalLM(config), rank=1, layers=layers).get_base_model()

    products = count_products(causal_lm, BATCH, trains, checkpointing)

    assert sum(count * product.flop for product, count in products.items()) == flop


def run_all(base: Path, rows_file: Path, folder: Path, *more: str | Path) -> tuple[dict[str, Any], str]:
    """Run the benchmarks on four rows; returns the JSON and what was printed."""
    options = ["--base", base, "--rows", "4", "--repeats", "1", "--threads", "1", "--json", folder / "all.json"]
    command = [sys.executable, "-m", "tests.benchmarks", rows_file, *options, *more]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "all.json").read_text(encoding="utf-8")), done.stdout


@pytest.mark.slow
def test_tiny_run_writes_table_json_and_plot(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    without_peer = ["--without-peer"] * (importlib.util.find_spec("trl") is None)
    content, printed = run_all(tiny_base, rows_file, tmp_path, "--plot", tmp_path / "all.png", *without_peer)
    assert content["complete"] is True
    assert {row["unit"] for row in content["rows"]} >= {"tokens/s", "share of ceiling", "peak memory, GB", "seconds"}
    (difference,) = (row["ours"] for row in content["rows"] if row["unit"] == "difference of losses")
    assert difference <= 1e-2  # in whatever dtype: scarce memory changes rounding alone
    others = [row for row in content["rows"] if row["unit"] != "difference of losses"]
    assert all(row["ours"] > 0 and (row["peer"] or 1) > 0 for row in others)
    assert len({run["tokens"] for run in content["runs"]}) == 1  # both sides, in each setting
    assert "share of ceiling" in printed
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quantizing_needs_no_more_private_memory_than_the_result_and_one_gibibyte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the 32 layers of Llama-3.1-8B's shape, with its whole embedding and head: the largest tensors."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    threads = os.cpu_count() or 1

    found = run_child("llama_8b", threads, folder=str(tmp_path / "base"), layers=2)
    step = run_child("one_batch", threads, base=str(tmp_path / "base"), lengths=[16, 16], dtype="auto", ceilings=1)

    assert found["first_private_bytes"] <= found["quantized_bytes"] + 1024**3
    # mapped, not read: what is private then are imports, and what the first load left behind
    assert found["second_private_bytes"] <= found["quantized_bytes"] / 2
    assert step["private_bytes"] < step["together_bytes"]  # nothing of the cached base is private
    assert step["steady"]["ceiling_seconds"] > 0


def test_the_page_on_several_devices_shows_the_calculated_table() -> None:
    assert "\n".join(communication.table()) in (ROOT / "tests" / "benchmarks" / "README.md").read_text(encoding="utf-8")
