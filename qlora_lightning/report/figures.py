"""Measurements of a run: base against adapter, and the figures by which runs are compared."""

import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

from qlora_lightning.evaluation import BASE
from qlora_lightning.evaluation.intervals import choose_digits, format_interval
from qlora_lightning.evaluation.scores import FORGETTING, describe_answered, describe_metric, is_share, shorten_text
from qlora_lightning.report.run_files import MeasuredSides, Run
from qlora_lightning.support.console import count_of
from qlora_lightning.support.files import MEMORY_PEAKS

PageTable = tuple[list[str], list[list[str]]]
"""Headings and rows; the first cell of a row is its label."""

_NO_SCORES = ("loss", FORGETTING, "perplexity", "token_accuracy", "stop_rate", "answer_tokens")
_MAX_CHARACTERS = 1_200  # of an answer: a model that does not stop would fill the page
_MAX_SAMPLES = 10


class Figure(NamedTuple):
    """A figure of a run; written as text it has its unit."""

    heading: str
    format: str
    value: float

    def __str__(self) -> str:
        return self.format.format(self.value) if self.format else str(timedelta(seconds=round(60 * self.value)))


def find_scores(comparison: Mapping[str, MeasuredSides]) -> list[str]:
    """Return the names of scores, of pairs and of answers, the most important one first."""
    return [name for name in comparison if name not in _NO_SCORES]


def describe_rows(run: Run) -> str:
    """Return which validation rows were evaluated, and how many."""
    rows, answered_rows = run.evaluation.get("rows") or 0, run.evaluation.get("answered_rows") or 0
    return f"{count_of(rows, 'validation row')}{describe_answered(answered_rows, rows)}"


def find_figures(run: Run) -> dict[str, Figure]:
    """Return each figure that is known, by its name in the JSON."""
    comparison, progress = run.comparison, run.manifest["progress"]
    logged = {name: [value for _, value in points] for name, points in run.metrics.items() if points}
    figures: dict[str, Figure] = {}

    def add(name: str, heading: str, form: str, value: float | None) -> None:
        if value is not None and not math.isnan(value):
            figures[name] = Figure(heading, form, value)

    for metric in ("loss", *find_scores(comparison), "token_accuracy"):
        values, is_loss = logged.get(f"val_{metric}", [math.nan]), metric == "loss"
        value = min(values) if is_loss else max(values)
        if metric in comparison:  # of the adapter that was kept
            value = comparison[metric].adapter.value
        heading = "validation loss" if is_loss else describe_metric(metric)
        add("val_loss" if is_loss else metric, heading, "{:.4f}" if is_loss else "{:.1%}", value)
    add("train_loss", "training loss, last", "{:.4f}", logged.get("train_loss", [math.nan])[-1])
    speeds = logged.get("tokens_per_second", [math.nan])
    add("tokens_per_second", "tokens/s, median", "{:,.0f}", statistics.median(speeds))
    peak = next((max(logged[name]) for name in MEMORY_PEAKS if name in logged), None)
    add("peak_memory_gib", "peak memory", "{:.2f}\u00a0GiB", peak)
    if run.status != "running":  # the manifest has the seconds at the last validation
        add("minutes", "wall time, h:mm:ss", "", (progress.get("seconds") or math.nan) / 60)
    add("steps", "optimizer steps", "{:,.0f}", progress.get("steps"))
    add("tokens", "tokens", "{:,.0f}", progress.get("tokens") or logged.get("tokens_seen", [math.nan])[-1])
    return figures


def figure_table(runs: Sequence[Run]) -> PageTable:
    """Return the known figures of each run; above them the hashes of the validation rows, if these differ."""
    columns = [find_figures(run) for run in runs]
    headings = {name: figure.heading for figures in columns for name, figure in figures.items()}
    rows = [[heading, *(str(figures.get(name, "–")) for figures in columns)] for name, heading in headings.items()]
    hashes = [((run.manifest["data"].get("hashes") or {}).get("val") or "–")[:8] for run in runs]
    if len(set(hashes)) > 1:
        rows.insert(0, ["other validation rows, not comparable", *hashes])
    return ["", *(run.name for run in runs)], rows


def comparison_table(run: Run) -> PageTable:
    """Return each metric of base and adapter and their difference, with its interval."""
    rows = []
    for metric, measured in run.comparison.items():
        digits, signs = choose_digits(measured), ("", "", "+")
        pairs, as_percent = zip(measured, signs, strict=True), is_share(metric)
        texts = [format_interval(interval, as_percent, sign, digits) for interval, sign in pairs]
        rows.append([describe_metric(metric), *(text.replace("-", "−") for text in texts)])
    return [describe_rows(run), *MeasuredSides._fields], rows


def find_samples(run: Run) -> list[list[tuple[str, str, bool]]]:
    """Return prompt, expected and both answers of some rows, each with whether it is the adapter's and right."""
    samples = []
    for row in (run.evaluation.get("samples") or [])[:_MAX_SAMPLES]:
        texts = {side: row.get(side, "").strip() for side in ("prompt", "expected", BASE, "adapter")}
        is_right = texts["adapter"] == texts["expected"]
        shown = {side: shorten_text(text, _MAX_CHARACTERS, side == "prompt") for side, text in texts.items()}
        samples.append([(side, text, side == "adapter" and is_right) for side, text in shown.items()])
    return samples
