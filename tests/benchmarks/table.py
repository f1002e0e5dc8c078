"""The rows of the table: what each compares, and the goal that it is held against."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from tests.benchmarks.figures import Figures
from tests.benchmarks.settings import ALL_LAYERS

Runs = Mapping[str, Sequence[Figures]]  # of each side
_GB = 1e9


@dataclass(frozen=True)
class Goal:
    """What a row should reach: at least or at most a value, of ours alone or of ours over the peer's."""

    bound: Literal["≥", "≤"]
    value: float
    unit: str
    of_ratio: bool = False

    def is_reached(self, found: float) -> bool:
        """Judge a value."""
        return found >= self.value if self.bound == "≥" else found <= self.value

    def __str__(self) -> str:
        return f"{self.bound} {self.value:g} {self.unit}".strip()


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: was measured, with its unit.
        ours: our figure.
        peer: the peer's, where it has one.
        goal: if one was set.
        digits: behind the point.
    """

    what: str
    ours: float
    peer: float | None = None
    goal: Goal | None = None
    digits: int = 2

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        return None if self.peer is None else self.ours / self.peer

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; ``None`` without a goal, or without the peer that it speaks of."""
        judged = self.ratio if self.goal is not None and self.goal.of_ratio else self.ours
        return None if self.goal is None or judged is None else self.goal.is_reached(judged)


def compare_sides(plain: Runs, checkpointing: Runs, accelerator: str) -> list[Row]:
    """Make the rows of speed and memory: medians over the runs of each side."""
    memory = "GPU memory" if accelerator == "gpu" else "peak RSS"
    settings = (("plain", plain, 6, 0.25), ("checkpointed", checkpointing, 4, 0.22))
    rows = [
        _row(f"tokens/s, {name}", runs, lambda run: run.tokens_per_second, Goal("≥", speed, "×", True), 1)
        for name, runs, speed, _ in settings
    ]
    return rows + [
        _row(f"{memory}, {name} (GB)", runs, lambda run: run.peak_bytes / _GB, Goal("≤", most, "×", True))
        for name, runs, _, most in settings
    ]


def rows_of_selective(runs: Sequence[Figures], accelerator: str) -> list[Row]:
    """Make the rows of ours with every second layer checkpointed: between the two settings in speed and in memory."""
    memory = "GPU memory" if accelerator == "gpu" else "peak RSS"
    return [
        Row("tokens/s, every 2nd layer checkpointed", median(run.tokens_per_second for run in runs), digits=1),
        Row(f"{memory}, every 2nd layer checkpointed (GB)", median(run.peak_bytes / _GB for run in runs)),
    ]


def rows_of_busy_machine(plain: Runs, busy: Sequence[Figures]) -> list[Row]:
    """Make the rows of ours beside busy loops: its speed, and the share of that on an idle machine."""
    if not busy:
        return []
    speed, idle = (median(run.tokens_per_second for run in runs) for runs in (busy, plain["ours"]))
    return [
        Row("tokens/s, beside busy loops", speed, digits=1),
        Row("share of idle speed, beside busy loops", speed / idle, goal=Goal("≥", 0.45, "")),
    ]


def compare_ceilings(plain: Runs, checkpointing: Runs) -> list[Row]:
    """Make the roofline rows: ours against its products alone, in training and in validation."""
    rows = []
    for name, runs in (("plain", plain["ours"]), ("checkpointed", checkpointing["ours"])):
        steps = [
            (run.ceiling, run.tokens, run.steady_seconds)
            for run in runs
            if run.ceiling is not None and run.steady_seconds is not None
        ]
        rows += ceiling_rows(name, steps, Goal("≥", 0.65, ""))
    passes = [run.validation for run in plain["ours"] if run.validation is not None]
    validations = [(found["ceiling"], found["tokens"], found["seconds"]) for found in passes]
    if validations:
        rows.append(
            Row("tokens/s, validation", median(tokens / seconds for _, tokens, seconds in validations), digits=1)
        )
    return rows + ceiling_rows("validation", validations, Goal("≥", 0.7, ""))


def ceiling_rows(name: str, timed: Sequence[tuple[Mapping[str, Any], int, float]], goal: Goal | None) -> list[Row]:
    """Make three rows: the share of the ceiling, its tokens/s, and its GFLOP/s.

    Args:
        name: of the work.
        timed: of each run its ceiling, tokens and seconds.
        goal: of the share, if one was set.
    """
    if not timed:
        return []
    share = median(ceiling["seconds"] / seconds for ceiling, _, seconds in timed)
    speed = median(tokens / ceiling["seconds"] for ceiling, tokens, _ in timed)
    rate = median(ceiling["flop"] / ceiling["seconds"] for ceiling, _, _ in timed)
    return [
        Row(f"share of ceiling, {name}", share, goal=goal),
        Row(f"  ceiling tokens/s, {name}", speed, digits=1),
        Row(f"  ceiling GFLOP/s, {name}", rate / 1e9, digits=0),
    ]


def compare_starts(plain: Runs) -> list[Row]:
    """Make the rows of a second start, to the begin of the first step."""
    started = _row("second start (s)", plain, lambda run: run.start_seconds, Goal("≤", 0.75, "×", True))
    beyond = median(run.start_seconds - run.import_seconds for run in plain["ours"])
    return [
        started,
        Row("  of it imports (s)", median(run.import_seconds for run in plain["ours"])),
        Row("  beyond the imports (s)", beyond, goal=Goal("≤", 1.0, "s")),
    ]


def rows_of_8b(step: Mapping[str, Any], layers: int) -> list[Row]:
    """Make the rows of a step on a base of Llama-3.1-8B's shape; goals are of one with all layers."""
    name, whole = name_8b(layers), layers == ALL_LAYERS
    timed = [(step["ceiling"], step["tokens"], step["seconds"])]
    together, private, start, share = (
        goal if whole else None
        for goal in (Goal("≤", 6.5, "GB"), Goal("≤", 1.0, "GB"), Goal("≤", 9, "s"), Goal("≥", 0.85, ""))
    )
    return [
        Row(f"{name}: tokens/s", step["tokens_per_second"]),
        Row(f"{name}: private + base (GB)", step["together_bytes"] / _GB, goal=together),
        Row(f"{name}: private (GB)", step["private_bytes"] / _GB, goal=private),
        Row(f"{name}: mapped files (GB)", step["mapped_bytes"] / _GB),
        Row(f"{name}: start, cached base (s)", step["start_seconds"], goal=start),
        *ceiling_rows(name, timed, share),
    ]


def name_8b(layers: int) -> str:
    """Name a base of Llama-3.1-8B's shape."""
    return "8B" if layers == ALL_LAYERS else f"{layers} layer{'s' if layers > 1 else ''} of 8B"


def _row(what: str, runs: Runs, figure: Callable[[Figures], float], goal: Goal, digits: int = 2) -> Row:
    medians = {side: median(map(figure, of_side)) for side, of_side in runs.items()}
    return Row(what, medians["ours"], medians.get("peer"), goal, digits)
