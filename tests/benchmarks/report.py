"""What the runs came to: the table, the ratios and the machine, as text, JSON and bars."""

import json
import os
import platform
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.figures import Figures

Runs = dict[str, list[Figures]]


def summarize(runs: Runs, setup: dict[str, Any]) -> dict[str, Any]:
    """Give all that is reported, ready for JSON: the medians of each side, their ratios, the machine, every run.

    Args:
        runs: of each side, in the order in which they ran.
        setup: what was asked for.
    """
    sides = {name: _medians(of_side) for name, of_side in runs.items()}
    return {
        "setup": setup,
        "sides": sides,
        "ratios": _ratios(sides["ours"], sides["peer"]) if "peer" in sides else {},
        "machine": _describe_machine(runs),
        "runs": {
            name: [{**asdict(run), "tokens_per_second": run.tokens_per_second} for run in of_side]
            for name, of_side in runs.items()
        },
    }


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the table, the ratios, and the machine with its date."""
    table = Table("", "tokens", "tokens/s", "peak RSS (GiB)", "first loss", "last loss")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, side in summary["sides"].items():
        table.add_row(
            name,
            f"{side['tokens']:,}",
            f"{side['tokens_per_second']:.1f}",
            f"{side['peak_rss_gib']:.2f}",
            f"{side['first_loss']:.3f}",
            f"{side['last_loss']:.3f}",
        )
    console.print(table)
    if summary["ratios"]:
        console.print(f"ours / peer: {summary['ratios']['tokens_per_second']:.2f} × the tokens/s")
        console.print(f"ours / peer: {summary['ratios']['peak_rss_gib']:.2f} × the peak RSS")
    machine = summary["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    machine_and_load = (
        f"{machine['cpu']}, {machine['cores']} cores, load {summary['setup']['load_average']} at the start"
    )
    console.print(f"{machine_and_load}; {versions}; {machine['date']}", soft_wrap=True)


def write_json(summary: dict[str, Any], file: Path) -> None:
    """Write the summary."""
    file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def draw_bars(summary: dict[str, Any], file: Path) -> None:
    """Draw both figures as bars, a side each. It takes matplotlib."""
    from matplotlib.figure import Figure

    sides = summary["sides"]
    figure = Figure(figsize=(7, 3), layout="constrained")
    wanted = {"tokens_per_second": ("tokens/s (more is better)", "%.0f"), "peak_rss_gib": ("peak RSS, GiB", "%.2f")}
    for axes, (key, (title, form)) in zip(figure.subplots(1, 2), wanted.items(), strict=True):
        bars = axes.bar(list(sides), [side[key] for side in sides.values()])
        bars[0].set_color("tab:orange")  # ours
        axes.bar_label(bars, fmt=form)
        axes.set_title(title)
        axes.margins(y=0.15)
    figure.savefig(file, dpi=150)


def _medians(runs: list[Figures]) -> dict[str, float]:
    return {
        "tokens": runs[0].tokens,
        "tokens_per_second": median(run.tokens_per_second for run in runs),
        "peak_rss_gib": median(run.peak_rss_gib for run in runs),
        "first_loss": median(run.losses[0] for run in runs),
        "last_loss": median(run.losses[-1] for run in runs),
    }


def _ratios(ours: dict[str, float], peer: dict[str, float]) -> dict[str, float]:
    return {key: ours[key] / peer[key] for key in ("tokens_per_second", "peak_rss_gib")}


def _describe_machine(runs: Runs) -> dict[str, Any]:
    """Name the CPU and the versions; where the peer's differ from ours, both."""
    versions = dict(runs["ours"][0].versions)
    for package, number in (runs["peer"][0].versions if "peer" in runs else {}).items():
        if versions.setdefault(package, number) != number:
            versions[f"the peer's {package}"] = number
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "versions": versions,
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
