"""The recorded steps as tables and as JSON."""

from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_lightning.base.tensors import format_bytes
from qlora_lightning.commands.profile.parts import PARTS, RECOMPUTATION
from qlora_lightning.commands.profile.recorder import StepRecorder


def summarize(record: StepRecorder) -> dict[str, Any]:
    """Gather all figures, in the form of the JSON: milliseconds and calls per step, bytes."""
    shares = [(part, record.time.shares[part]) for part in PARTS if part in record.time.shares]
    seconds = sum(share.seconds for _, share in shares)
    return {
        "device": record.device,
        "steps": record.recorded,
        "tokens_per_step": record.tokens / record.recorded,
        "tokens_per_second": record.tokens / seconds,
        "ms_per_step": 1e3 * seconds / record.recorded,
        "ms_of_steps": [1e3 * each for each in record.time.seconds],
        "time": {
            part: {
                "ms": 1e3 * share.seconds / record.recorded,
                "share": share.seconds / seconds,
                "calls": share.calls / record.recorded,
            }
            for part, share in shares
        },
        "memory": vars(record.memory),
        "ranks_counted_as_base": sorted(record.time.widths.clashing),
    }


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    console.print(_time_table(summary))
    console.print(
        f"{summary['tokens_per_step']:,.0f} tokens per step, {summary['tokens_per_second']:,.0f} tokens/s under the "
        f"profiler; {summary['steps']} steps on {summary['device']}"
    )
    if summary["steps"] > 1:
        quickest, slowest = min(summary["ms_of_steps"]), max(summary["ms_of_steps"])
        console.print(f"The quickest step took {quickest:,.0f} ms, the slowest {slowest:,.0f} ms.")
    for width in summary["ranks_counted_as_base"]:
        console.print(f"A rank, or a sum of them, is {width}, a width of the base too: such products count as base.")
    console.print(_memory_table(summary["memory"]))


def _time_table(summary: dict[str, Any]) -> Table:
    table = _table("Time of a step", "part", "ms per step", "share", "calls")
    for part, share in summary["time"].items():
        table.add_row(part, f"{share['ms']:,.1f}", f"{share['share']:.1%}", f"{share['calls']:,.0f}")
    table.add_section()
    table.add_row("all", f"{summary['ms_per_step']:,.1f}", "100.0%", "")
    return table


def _memory_table(memory: dict[str, Any]) -> Table:
    table = _table("Memory", "of", "bytes")
    rows = {f"base, {dtype}": size for dtype, size in memory["base"].items()}
    rows |= {"adapters": memory["adapters"], "gradients": memory["gradients"], "optimizer state": memory["optimizer"]}
    kept = {part: memory["kept"][part] for part in PARTS if part in memory["kept"]}
    rows |= {"kept for backward": sum(kept.values())}
    rows |= {f"  {'checkpointed inputs' if part == RECOMPUTATION else part}": size for part, size in kept.items()}
    rows |= {"logits at a time": memory["logits"]}
    for name, size in rows.items():
        table.add_row(name, format_bytes(size))
    table.add_section()
    for name, size in memory["peaks"].items():
        table.add_row(name, format_bytes(size))
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
