"""``python -m tests.benchmarks.stub``: memory, launches and the host's time of 8B's shape, on the stub of a card.

Beside PEFT and, if ``--unsloth-python`` names an interpreter that has it, Unsloth, without its compilation, which takes
many minutes. Steps of 4,096 tokens in rows of 1,024, all labeled; rank 16 on all linears, bf16, AdamW. Then steps of
Qwen3-30B-A3B's shape, with adapters on attention, and of Qwen3.5-9B's, in rows of 128.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.child import ROOT, run_child
from tests.gpu.on_card import save_wide, tokens_of
from tests.rows import write_rows

_COLUMNS = ("peak GiB", "launches", "waits, reads", "CPU ms of the host")
MODES = ("plain", "checkpointed", "offloaded")
_ADAPTERS = 14  # of a layer: their gradients are added to those of the step before, a launch each
_BUILD = "import json, sys, pathlib, tests.gpu.stub as s; print(json.dumps(s.build_stub(pathlib.Path(sys.argv[1]))))"
_UNSLOTH = {"UNSLOTH_COMPILE_DISABLE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}


class Sides:
    """The interpreters of the sides, each with a stub for its torch."""

    def __init__(self, folder: Path, unsloth_python: str | None) -> None:
        self.base = str(folder / "base")
        self.pythons = {"ours": sys.executable, "peft": sys.executable}
        self.pythons |= {"unsloth": unsloth_python} if unsloth_python else {}
        self.environments: dict[str, dict[str, str]] = {}
        for side, python in self.pythons.items():
            (folder / side).mkdir()
            command = [python, "-c", _BUILD, str(folder / side)]
            built = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            self.environments[side] = json.loads(built.stdout) | _UNSLOTH
            self.environments[side]["UNSLOTH_COMPILE_LOCATION"] = str(folder / "compiled")

    def run(self, function: str, side: str, mib: int, /, **options: Any) -> dict[str, Any]:
        """Call a function of ``stub_step.py`` with a side's interpreter on a card of so much memory."""
        card = self.environments[side] | {"STUB_MIB": str(mib), "STUB_CC": "89"}
        return run_child(f"stub_step.{function}", 1, self.pythons[side], card, **options)

    def step(self, side: str, mode: str, **options: Any) -> dict[str, Any]:
        """Measure steps of a side, of Llama-3.1-8B's shape unless told otherwise."""
        usual = {"tokens": 4096, "shape": "llama-3.1-8b", "layers": 32, "base": self.base}
        figures = self.run("measure", side, 128 << 10, side=side, mode=mode, **usual | options)
        print(side, mode, figures, flush=True)
        return figures


def add_row(table: Table, name: str, figures: dict[str, Any], ours: dict[str, Any]) -> None:
    """Add the figures of a side, with ours over theirs in brackets."""
    keys = ("gib", "launches", "host")
    shares = {key: "" if figures is ours else f" ({ours[key] / figures[key]:.2f})" for key in keys}
    table.add_row(
        name,
        f"{figures['gib']:.2f}{shares['gib']}",
        f"{figures['forward']:,} + {figures['backward']:,}{shares['launches']}",
        f"{figures['waits']}, {figures['reads']}",
        f"{figures['host']:.0f}{shares['host']}",
    )


def compare(sides: Sides, repeats: int) -> Table:
    """Return the table of steps beside the peers; the host's time is the median of all turns."""
    pairs = [(side, mode) for mode in MODES for side in sides.pythons if (side, mode) != ("peft", "offloaded")]
    turns = [{pair: sides.step(*pair) for pair in pairs} for _ in range(repeats)]
    found = {pair: turns[0][pair] | {"host": median(turn[pair]["host"] for turn in turns)} for pair in pairs}
    table = Table("4,096 tokens", *_COLUMNS)
    for side, mode in pairs:
        add_row(table, f"{side}, {mode}", found[side, mode], found["ours", mode])
    half, whole = sides.step("ours", "plain", layers=16), found["ours", "plain"]
    forward, backward = ((whole[name] - half[name]) / 16 for name in ("forward", "backward"))
    table.add_row("a layer of ours", "", f"{forward:.0f} + {backward - _ADAPTERS:.0f}")
    return table


def compare_mixture(sides: Sides) -> Table:
    """Return the table of steps of Qwen3-30B-A3B's shape, beside PEFT with bitsandbytes' parametrization."""
    table = Table("Qwen3-30B-A3B", *_COLUMNS)
    for mode, tokens in (("plain", 1024), ("checkpointed", 4096)):
        options = {"tokens": tokens, "shape": "qwen3-30b-a3b", "layers": 48}
        ours = sides.step("ours", mode, **options)
        add_row(table, f"ours, {mode}, {tokens:,} tokens", ours, ours)
        add_row(table, f"PEFT, {mode}, {tokens:,} tokens", sides.step("peft", mode, **options), ours)
    return table


def compare_recurrent(sides: Sides) -> Table:
    """Return the table of steps of Qwen3.5-9B's shape in rows of 128 tokens, beside PEFT."""
    options = {"shape": "qwen3.5-9b", "row": 128}
    found = {side: sides.step(side, "checkpointed", **options) for side in ("ours", "peft")}
    table = Table("Qwen3.5-9B, checkpointed", *_COLUMNS)
    for side, figures in found.items():
        add_row(table, side, figures, found["ours"])
    return table


def plan(sides: Sides, folder: Path) -> Table:
    """Return the table of fits: README's rows, with what is planned and measured."""
    write_rows(folder / "rows.jsonl", tokens_of([*range(1, 2049, 13)]))
    table = Table("card", "tokens at a time", "planned", "measured", "loading", "lowered")
    for gib in (24, 16, 12, 8):  # the first quantizes the base
        limits = {"data.batch_size": 16, "data.max_length": 2048, "model.rank": 8}
        figures = sides.run("fit", "ours", gib << 10, folder=str(folder), name=str(gib), **limits)
        peaks = f"{figures['planned']:.2f}", f"{figures['gib']:.2f}", figures["loaded"]
        table.add_row(f"{gib} GiB", f"{figures['tokens']}, {figures['choice']}", *peaks, str(figures["lowered"]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.stub", description=__doc__)
    parser.add_argument("--unsloth-python", metavar="PATH", help="an interpreter that has Unsloth")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, in turns")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, console = Path(name), Console(width=120)
        save_wide(folder / "base", 32, 128_256)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        sides = Sides(folder, arguments.unsloth_python)
        console.print(plan(sides, folder))
        console.print(compare(sides, arguments.repeats))
        console.print(compare_mixture(sides))
        console.print(compare_recurrent(sides))


if __name__ == "__main__":
    main()
