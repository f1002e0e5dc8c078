"""The figures by which runs are judged."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlora_lightning.evaluation.names import describe_metric
from qlora_lightning.report.judged import ADAPTER, is_of_test, judged, score_names
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


_LOSSES = (Result("val_loss", "validation loss", "loss", "low"), Result("test_loss", "test loss", "loss", "low"))
_OTHERS = (
    Result("token_accuracy", "token accuracy", "share", "high"),
    Result("test_token_accuracy", "token accuracy, test rows", "share", "high"),
    Result("train_loss", "training loss, last", "loss", "low"),
    Result("tokens_per_second", "tokens/s", "whole", "high"),
    Result("peak_memory_gib", "peak memory, GiB", "number", "low"),
    Result("minutes", "minutes", "number", "low"),
    Result("steps", "steps", "whole"),
    Result("tokens", "tokens", "whole"),
)


def list_results(runs: Sequence[Run]) -> list[Result]:
    """Give the figures that runs may have: besides those of every run, whichever scores were measured in one."""
    scores = {
        name: Result(name, f"{describe_metric(score)}{', test rows' if is_of_test(run) else ''}", "share", "high")
        for run in runs
        for name, score in _scores(run).items()
    }
    return [*_LOSSES, *scores.values(), *_OTHERS]


def main_score(run: Run) -> str | None:
    """Name the score that counts most, as in :func:`find_results`; ``None`` where none was measured."""
    return next(iter(_scores(run)), None)


def find_results(run: Run) -> dict[str, float | None]:
    """Give every figure of :func:`list_results` by name; ``None`` where the folder does not tell it.

    What was measured on test rows has a name of its own.
    """
    manifest, metrics = run.manifest, run.metrics
    progress: Mapping[str, Any] = manifest.get("progress") or {}
    best = min((value for _, value in metrics.get("val_loss", [])), default=None)
    speeds = [value for _, value in metrics.get("tokens_per_second", [])]
    steps = max((points[-1][0] for points in metrics.values() if points), default=None)
    seconds = progress.get("seconds")
    loss, accuracy = (judged(run, metric, ADAPTER) for metric in ("loss", "token_accuracy"))
    test = is_of_test(run)
    return {
        "val_loss": best if test else _first(loss, best),
        "test_loss": loss if test else None,
        **{name: judged(run, score, ADAPTER) for name, score in _scores(run).items()},
        "token_accuracy": _first(None if test else accuracy, highest(metrics, "val_token_accuracy")),
        "test_token_accuracy": accuracy if test else None,
        "train_loss": last(metrics, "train_loss"),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "peak_memory_gib": _peak(run),
        "minutes": None if seconds is None else seconds / 60,
        "steps": _first(progress.get("steps"), steps),
        "tokens": _first(progress.get("tokens"), last(metrics, "tokens_seen")),
    }


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


def _scores(run: Run) -> dict[str, str]:
    """Give the scores of a run by the names of their figures."""
    return {f"test_{score}" if is_of_test(run) else score: score for score in score_names(run)}


def _peak(run: Run) -> float | None:
    written: Mapping[str, Any] = run.manifest.get("peak_memory_gib") or {}
    return next((gib for name in _PEAKS if (gib := _first(written.get(name), highest(run.metrics, name)))), None)


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
