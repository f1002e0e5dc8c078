"""Runs both sides in turns, with and without gradient checkpointing, as often as asked, and ours on a busy machine."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from qlora_lightning.support.errors import UserError
from tests.benchmarks.figures import Figures
from tests.benchmarks.settings import MAX_LENGTH
from tests.benchmarks.sides import Side


@dataclass
class Measured:
    """All runs.

    Attributes:
        plain: of each side without gradient checkpointing.
        checkpointing: of each side with it.
        busy: ours without gradient checkpointing, beside as many busy loops as it has threads; on a CPU.
        selective: ours with every second layer checkpointed.
    """

    plain: dict[str, list[Figures]] = field(default_factory=dict)
    checkpointing: dict[str, list[Figures]] = field(default_factory=dict)
    busy: list[Figures] = field(default_factory=list)
    selective: list[Figures] = field(default_factory=list)


def measure_sides(sides: Sequence[Side], repeats: int, measured: Measured, console: Console) -> Iterator[None]:
    """Run every side in turns; before them, one step each that fills the caches, so that all starts are second ones.

    Args:
        sides: ours first.
        repeats: of every run.
        measured: gets all runs.
        console: told of each.

    Yields:
        After each run.
    """
    for side in sides:
        console.print(f"{side.name}, a step to fill the caches …")
        side.measure("--max-steps=1")
    for repeat in range(1, repeats + 1):
        for runs, option in ((measured.plain, ()), (measured.checkpointing, ("--gradient-checkpointing",))):
            for side in sides:
                with_checkpointing = ", gradient checkpointing" if option else ""
                console.print(f"{side.name}{with_checkpointing}, run {repeat} of {repeats} … ", end="")
                figures = side.measure(*option)
                runs.setdefault(side.name, []).append(figures)
                console.print(_describe(figures))
                yield
        _check_same_work(measured.plain)
        if sides[0].accelerator == "cpu":
            console.print(f"ours, beside {sides[0].threads} busy loops, run {repeat} of {repeats} … ", end="")
            with _busy_loops(sides[0].threads):
                measured.busy.append(sides[0].measure("--without-ceilings"))
            console.print(_describe(measured.busy[-1]))
            yield
        console.print(f"ours, every second layer checkpointed, run {repeat} of {repeats} … ", end="")
        measured.selective.append(sides[0].measure("--gradient-checkpointing", "--every-n-layers=2"))
        console.print(_describe(measured.selective[-1]))
        yield


@contextlib.contextmanager
def _busy_loops(count: int) -> Iterator[None]:
    """Keep as many cores at work as other programs of the user might."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _check_same_work(runs: Mapping[str, Sequence[Figures]]) -> None:
    """Refuse rows of which the sides train on different tokens: each cuts those that are too long in its own way.

    Raises:
        UserError: they do.
    """
    tokens = {side: figures[-1].tokens for side, figures in runs.items()}
    if len(set(tokens.values())) > 1:
        told = " and ".join(f"{side} {count:,}" for side, count in tokens.items())
        raise UserError(
            f"The sides trained on different tokens of the same rows ({told}): are some longer than {MAX_LENGTH} "
            "tokens? Each side cuts those in its own way; leave them out of DATA."
        )


def _describe(figures: Figures) -> str:
    loss = f"loss {figures.losses[0]:.3f} to {figures.losses[-1]:.3f}"
    speed = f"{figures.tokens_per_second:.1f} tokens/s, {figures.peak_bytes / 1e9:.2f} GB"
    return f"{len(figures.losses)} steps, started in {figures.start_seconds:.1f} s, {speed}, {loss}"
