"""The figures by which runs are judged."""

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from qlora_lightning.report.metrics import highest, last
from qlora_lightning.report.run import Run
from qlora_lightning.report.ticks import write_number

_PEAKS = ("memory_peak_gib", "peak_rss_gib", "private_memory_gib")  # of the device; of the process; of it alone


class Result(NamedTuple):
    """One figure of a run.

    Attributes:
        name: As in the JSON.
        heading: As people read it.
        style: How it is written: ``share``, ``whole``, ``number`` or ``loss``.
        better: ``low`` or ``high``; empty where neither is.
    """

    name: str
    heading: str
    style: str
    better: str = ""


RESULTS = (
    Result("val_loss", "validation loss", "loss", "low"),
    Result("exact_match", "exact match", "share", "high"),
    Result("token_accuracy", "token accuracy", "share", "high"),
    Result("train_loss", "training loss, last", "loss", "low"),
    Result("tokens_per_second", "tokens/s", "whole", "high"),
    Result("peak_memory_gib", "peak memory, GiB", "number", "low"),
    Result("minutes", "minutes", "number", "low"),
    Result("steps", "steps", "whole"),
    Result("tokens", "tokens", "whole"),
)


def find_results(run: Run) -> dict[str, float | None]:
    """Give every figure of :data:`RESULTS` by name; ``None`` where the folder does not tell it."""
    manifest, metrics = run.manifest, run.metrics
    progress: Mapping[str, Any] = manifest.get("progress") or {}
    best = min((value for _, value in metrics.get("val_loss", [])), default=None)
    speeds = [value for _, value in metrics.get("tokens_per_second", [])]
    steps = max((points[-1][0] for points in metrics.values() if points), default=None)
    seconds = progress.get("seconds")
    return {
        "val_loss": _first(judged(run, "loss", "adapter"), best),
        "exact_match": judged(run, "exact_match", "adapter"),
        "token_accuracy": _first(judged(run, "token_accuracy", "adapter"), highest(metrics, "val_token_accuracy")),
        "train_loss": last(metrics, "train_loss"),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "peak_memory_gib": _peak(run),
        "minutes": None if seconds is None else seconds / 60,
        "steps": _first(progress.get("steps"), steps),
        "tokens": _first(progress.get("tokens"), last(metrics, "tokens_seen")),
    }


def judged(run: Run, metric: str, side: str) -> float | None:
    """Give a metric of ``base`` or ``adapter``, as ``evaluation.json`` has it."""
    found = ((run.evaluation.get("metrics") or {}).get(metric) or {}).get(side)
    value = found.get("value") if isinstance(found, Mapping) else found
    return float(value) if isinstance(value, int | float) else None


def write_result(value: float | None, style: str) -> str:
    """Write a figure for people; a dash where there is none."""
    if value is None:
        return "–"
    if style == "share":
        return f"{value:.1%}"
    if style == "whole":
        return f"{value:,.0f}"
    if style == "loss":
        return f"{value:.4f}"
    return write_number(float(f"{value:.3g}"))


def _peak(run: Run) -> float | None:
    written: Mapping[str, Any] = run.manifest.get("peak_memory_gib") or {}
    return next((gib for name in _PEAKS if (gib := _first(written.get(name), highest(run.metrics, name)))), None)


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
