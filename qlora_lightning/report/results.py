"""The figures by which runs are judged."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlora_lightning.evaluation.names import describe_metric
from qlora_lightning.report.judged import ADAPTER, is_of_fit, is_of_run, is_of_test, judged, score_names
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


_LATER = "evaluated_"
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
    later = [run for run in runs if _prefix(run) == _LATER]
    rows = [f"{rows:,}" for rows in sorted({int(run.evaluation.get("rows") or 0) for run in later})]
    comparable = len(rows) < 2  # figures of other rows are no better and no worse
    words = {"test_": ", test rows", _LATER: f", evaluated on {' and '.join(rows)} validation rows"}

    def name_result(run: Run, name: str, metric: str, style: str, better: str) -> Result:
        better = better if comparable or _prefix(run) != _LATER else ""
        return Result(name, f"{describe_metric(metric)}{words.get(_prefix(run), '')}", style, better)

    scores = {
        name: name_result(run, name, score, "share", "high") for run in runs for name, score in _scores(run).items()
    }
    evaluated = [
        name_result(later[0], f"{_LATER}{metric}", metric, style, better)
        for metric, style, better in (("loss", "loss", "low"), ("token_accuracy", "share", "high"))
        if later
    ]
    return [*_LOSSES, *evaluated[:1], *scores.values(), *evaluated[1:], *_OTHERS]


def main_score(run: Run) -> str | None:
    """Name the score that counts most, as in :func:`find_results`; ``None`` where none was measured."""
    return next(iter(_scores(run)), None)


def find_results(run: Run) -> dict[str, float | None]:
    """Give every figure of :func:`list_results` by name; ``None`` where the folder does not tell it.

    What `evaluate` measured has names of its own, on test rows and on rows of the validation; of other adapters than
    the run's it is left out.
    """
    manifest, metrics = run.manifest, run.metrics
    progress: Mapping[str, Any] = manifest.get("progress") or {}
    best = min((value for _, value in metrics.get("val_loss", [])), default=None)
    speeds = [value for _, value in metrics.get("tokens_per_second", [])]
    steps = max((points[-1][0] for points in metrics.values() if points), default=None)
    seconds = progress.get("seconds")
    counts, prefix = is_of_run(run), _prefix(run)
    loss, accuracy = (judged(run, metric, ADAPTER) if counts else None for metric in ("loss", "token_accuracy"))
    own, test, later = not prefix, prefix == "test_", prefix == _LATER
    return {
        "val_loss": _first(loss if own else None, best),
        "test_loss": loss if test else None,
        **({f"{_LATER}loss": loss, f"{_LATER}token_accuracy": accuracy} if later else {}),
        **{name: judged(run, score, ADAPTER) for name, score in _scores(run).items()},
        "token_accuracy": _first(accuracy if own else None, highest(metrics, "val_token_accuracy")),
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
    return {f"{_prefix(run)}{score}": score for score in score_names(run)} if is_of_run(run) else {}


def _prefix(run: Run) -> str:
    """Give what stands before the names of figures that are not those of the fit itself."""
    return "test_" if is_of_test(run) else "" if is_of_fit(run) else _LATER


def _peak(run: Run) -> float | None:
    written: Mapping[str, Any] = run.manifest.get("peak_memory_gib") or {}
    return next((gib for name in _PEAKS if (gib := _first(written.get(name), highest(run.metrics, name)))), None)


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
