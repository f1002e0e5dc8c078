"""The report as one HTML page that needs nothing beside itself: of one run, or of several side by side."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning import __version__
from qlora_lightning.page.render import render_page
from qlora_lightning.report.chart import Chart, draw, find_x_range
from qlora_lightning.report.curves import charts_of, charts_of_all
from qlora_lightning.report.data_table import data_rows, data_warnings
from qlora_lightning.report.judged import describe_rows
from qlora_lightning.report.results import find_results, list_results, write_result
from qlora_lightning.report.run import Run, read_run
from qlora_lightning.report.settings import find_differences, write_setting
from qlora_lightning.report.verdict import columns_of, metric_rows, samples_of
from qlora_lightning.report.words import (
    STATUS,
    headline,
    machine_facts,
    training_facts,
    version_facts,
    word_seconds,
    word_subject,
)
from qlora_lightning.support.files import write_whole

NAME = "report.html"
MARK = '<meta name="generator" content="qlora_lightning report">'
_FOLDER = Path(__file__).parent


def write_run_page(folder: Path) -> Path:
    """Write ``report.html`` into a run folder, of what the folder holds.

    Raises:
        UserError: A file in it is damaged.
        OSError: The page cannot be written.
    """
    write_whole(folder / NAME, render_run(read_run(folder)))
    return folder / NAME


def render_run(run: Run) -> str:
    """Return the page of one run; every text from outside is escaped."""
    warnings = [(warning["text"], warning["count"]) for warning in run.manifest.get("warnings") or []]
    splits, data = data_rows(run)
    return _render(
        "page.html",
        run=run,
        status=STATUS.get(run.status, run.status),
        subject=word_subject(run),
        headline=headline(run),
        error=run.manifest.get("error"),
        metrics=metric_rows(run),
        samples=samples_of(run),
        columns=columns_of(run),
        evaluated=describe_rows(run),
        charts=_drawn(charts_of(run)),
        warnings=[(line, 1) for line in data_warnings(run)] + warnings,
        training=training_facts(run),
        splits=splits,
        data=data,
        machine=machine_facts(run),
        versions=version_facts(run),
        lives=[_life(life) for life in run.manifest.get("lives") or []],
        config=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else "",
    )


def render_comparison(runs: Sequence[Run]) -> str:
    """Return the page of several runs; every text from outside is escaped."""
    differences = find_differences([run.config for run in runs])
    return _render(
        "comparison.html",
        runs=[
            (run, STATUS.get(run.status, run.status), word_subject(run), number % 8) for number, run in enumerate(runs)
        ],
        results=result_table(runs),
        charts=_drawn(charts_of_all(runs)),
        settings=[(name, [write_setting(value) for value in values]) for name, values in differences.items()],
    )


def result_table(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Give each figure that a run has: its heading, and for each run how it is written and whether it is the best."""
    found = [find_results(run) for run in runs]
    table = []
    for result in list_results(runs):
        values = [each.get(result.name) for each in found]
        known = [value for value in values if value is not None]
        if known:
            best = {"low": min, "high": max}[result.better](known) if result.better and len(set(known)) > 1 else None
            cells = [(write_result(value, result.style), value is not None and value == best) for value in values]
            table.append((result.heading, cells))
    return table


def _render(template: str, **values: Any) -> str:
    script = (_FOLDER / "tooltip.js").read_text(encoding="utf-8")
    return render_page(_FOLDER / template, script, version=__version__, **values)


def _drawn(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """Draw charts over one range of steps, so that what happens at a step stands in the same place in all of them."""
    shared = find_x_range(charts)
    return [drawn for chart in charts if (drawn := draw(replace(chart, x_range=shared))) is not None]


def _life(life: dict[str, Any]) -> list[str]:
    steps = f"{life.get('from_step') or 0:,} to {life.get('to_step') or 0:,}"
    ended = life.get("error") or life.get("status") or ""
    started = str(life.get("started") or "").replace("T", " ").replace("+00:00", " UTC")
    return [started, steps, word_seconds(life.get("seconds") or 0.0), ended]
