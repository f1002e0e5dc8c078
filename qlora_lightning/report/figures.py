"""What was measured of a run: base against adapter, and the figures by which runs are compared."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from qlora_lightning.evaluation import BASE
from qlora_lightning.evaluation.intervals import PREFERENCE, Interval, choose_digits, format_interval
from qlora_lightning.evaluation.scores import GENERAL, describe_answered, describe_metric, is_share
from qlora_lightning.report.run_files import MEMORY, Run
from qlora_lightning.support.files import ADAPTER_FOLDER

PageTable = tuple[list[str], list[tuple[str, list[tuple[str, str]]]]]
"""Headings, and rows: what a row is, and its cells, each with a note below it."""

_NO_SCORES = ("loss", GENERAL, "perplexity", "token_accuracy", "stop_rate", "answer_tokens")
_LONGEST = 1_200  # characters shown of an answer: a model that does not stop would fill the page


class MeasuredSides(NamedTuple):
    """One metric of both sides; NaN is unknown."""

    base: Interval
    adapter: Interval
    difference: Interval


@dataclass(frozen=True)
class BaseComparison:
    """Base and the run's own adapter on the same rows, as ``evaluation.json`` has them."""

    split: str  # validation or test
    rows: str  # which, and how many, in words
    side: str  # name of the adapter among the answers
    scores: list[str]  # of pairs and of answers, the most important one first
    metrics: Mapping[str, MeasuredSides]  # empty if the run's adapter was not evaluated


class Figure(NamedTuple):
    """A figure of a run; written as text it has its unit."""

    heading: str
    format: str
    value: float
    best: Callable[[Iterable[float]], float] | None = None  # none of costs, and of what training rows show

    def __str__(self) -> str:
        return self.format.format(self.value) if self.format else str(timedelta(seconds=round(60 * self.value)))


def read_comparison(run: Run) -> BaseComparison:
    """Read ``evaluation.json`` as the fit or `evaluate` wrote it."""
    content, own = run.evaluation, (run.folder / ADAPTER_FOLDER).resolve()
    folders = content.get("adapters") or {"adapter": own}  # a fit evaluates its own
    # `evaluate` may have been started in another folder: the two last parts must do
    side = next((name for name, folder in folders.items() if Path(folder).absolute().parts[-2:] == own.parts[-2:]), "")
    metrics = {}
    for metric, sides in (content.get("metrics") or {}).items() if side else ():
        difference = (sides.get("differences") or {}).get(side) or sides.get("difference")
        metrics[metric] = MeasuredSides(*map(_read_interval, (sides.get(BASE), sides.get(side), difference)))
    split = "test" if content.get("split") == "test" else "validation"
    rows, answered = content.get("rows"), content.get("answered_rows")
    words = f"{rows:,} {split} rows{describe_answered(answered or 0, rows)}" if rows else f"{split} rows"
    names = dict.fromkeys([PREFERENCE, *(content.get("scores") or metrics)])
    scores = [name for name in names if name in metrics and name not in _NO_SCORES]
    return BaseComparison(split, words, side, scores, metrics)


def _read_interval(found: Mapping[str, float | None] | None) -> Interval:
    values = ((found or {}).get(name) for name in Interval._fields)
    return Interval(*(math.nan if value is None else float(value) for value in values))


def find_figures(run: Run) -> dict[str, Figure]:
    """Return each figure that is known, by its name in the JSON."""
    comparison, progress = read_comparison(run), run.manifest.get("progress") or {}
    logged = {name: [value for _, value in points] for name, points in run.metrics.items() if points}
    found: dict[str, Figure] = {}

    def add(name: str, heading: str, form: str, value: float | None, best: Any = None) -> None:
        if value is not None and not math.isnan(value):
            found[name] = Figure(heading, form, value, best)

    for metric in ("loss", *comparison.scores, "token_accuracy"):
        name, heading, form, best = metric, describe_metric(metric), "{:.1%}", max
        if metric == "loss":
            name, heading, form, best = "val_loss", "validation loss", "{:.4f}", min
        add(name, heading, form, best(logged.get(f"val_{metric}", [math.nan])), best)
        if metric in comparison.metrics:  # of the adapter that was kept
            if comparison.split == "test":
                name, heading = f"test_{metric}", f"{describe_metric(metric)}, test rows"
            add(name, heading, form, comparison.metrics[metric].adapter.value, best)
    add("train_loss", "training loss, last", "{:.4f}", logged.get("train_loss", [math.nan])[-1])
    speeds = logged.get("tokens_per_second", [math.nan])
    add("tokens_per_second", "tokens/s, median", "{:,.0f}", statistics.median(speeds))
    peaks = run.manifest.get("peak_memory_gib") or {name: max(logged[name]) for name in MEMORY if name in logged}
    peak = next((peaks[name] for name in MEMORY if name in peaks), None)
    add("peak_memory_gib", "peak memory", "{:.2f}\u00a0GiB", peak)
    if run.status != "running":  # the manifest has the seconds at the last validation
        add("minutes", "wall time, h:mm:ss", "", progress.get("seconds", math.nan) / 60)
    last_step = max((points[-1][0] for points in run.metrics.values() if points), default=None)
    add("steps", "optimizer steps", "{:,.0f}", progress.get("steps") or last_step)
    add("tokens", "tokens", "{:,.0f}", progress.get("tokens") or logged.get("tokens_seen", [math.nan])[-1])
    return found


def figure_table(runs: Sequence[Run]) -> PageTable:
    """Return the known figures of each run.

    Only losses, scores and accuracies have a best, and only if the runs that have them were measured on the same rows.
    """
    found = [find_figures(run) for run in runs]
    kinds = {name: figure for figures in found for name, figure in figures.items()}
    rows = []
    for name, kind in sorted(kinds.items(), key=lambda item: item[1].best is None):
        values = {figures[name].value for figures in found if name in figures}
        owners = [run for run, figures in zip(runs, found, strict=True) if name in figures]
        best = kind.best(values) if kind.best and len(values) > 1 and _share_rows(owners, name) else None
        shown = [figures.get(name) for figures in found]
        cells = [(str(each), "best" if each.value == best else "") if each else ("–", "") for each in shown]
        rows.append((kind.heading, cells))
    return ["", *(run.name for run in runs)], rows


def _share_rows(runs: Sequence[Run], name: str) -> bool:
    """Whether a figure of some runs was measured on the same rows, as far as their manifests say."""
    rows = set()
    for run in runs:
        hashes = (run.manifest.get("data") or {}).get("hashes") or {}
        split = (run.config.get("data") or {}).get("test") if name.startswith("test_") else hashes.get("val")
        counts = [run.evaluation.get(key) for key in ("rows", "answered_rows")]
        rows.add(repr((split, hashes.get("tokenizer"), counts)) if split else f"unknown of {run.name}")
    return len(rows) == 1


def comparison_table(run: Run) -> PageTable:
    """Return each metric of base and adapter and their difference, with its interval."""
    comparison, rows = read_comparison(run), []
    for metric, measured in comparison.metrics.items():
        digits, cells = choose_digits(measured), []
        for interval, sign in zip(measured, ("", "", "+"), strict=True):
            text = format_interval(interval, is_share(metric), sign, digits).replace("-", "−")
            value, _, reach = text.removesuffix("]").partition(" [")
            cells.append((value, reach.replace(", ", " to ")))
        rows.append((describe_metric(metric), cells))
    return [comparison.rows, *MeasuredSides._fields], rows


def find_samples(run: Run) -> list[list[tuple[str, str, bool]]]:
    """Return prompt, expected and both answers of some rows, each with whether it is a right one of the adapter."""
    comparison = read_comparison(run)
    samples = []
    for row in run.evaluation.get("samples") or [] if comparison.metrics else []:
        texts = {side: str(row.get(side) or "").strip() for side in ("prompt", "expected", BASE, comparison.side)}
        is_right = texts[comparison.side] == texts["expected"]
        samples.append([(side, _shorten(text), side == comparison.side and is_right) for side, text in texts.items()])
    return samples


def _shorten(text: str) -> str:
    return f"{text[:_LONGEST]} …" if len(text) > _LONGEST else text or "(empty)"
