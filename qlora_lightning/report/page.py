"""The report as one HTML page that needs nothing beside itself: of one run, or of several side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning import __version__
from qlora_lightning.page.render import render_page
from qlora_lightning.report import facts
from qlora_lightning.report.charts import charts_of, charts_of_all, draw_charts
from qlora_lightning.report.results import describe_rows, find_samples, metric_rows, result_table, write_seconds
from qlora_lightning.report.run import Run, read_run, reading
from qlora_lightning.support.files import write_whole

NAME = "report.html"
MARK = '<meta name="generator" content="qlora_lightning report">'
_FOLDER = Path(__file__).parent


def write_run_page(folder: Path) -> Path:
    """Write ``report.html`` into a run folder.

    Raises:
        UserError: A file in it is damaged.
        OSError: The page cannot be written.
    """
    write_whole(folder / NAME, render_run(read_run(folder)))
    return folder / NAME


def render_run(run: Run) -> str:
    """Return the page of one run; every text from outside is escaped."""
    with reading(run):
        warnings = [(warning["text"], warning["count"]) for warning in run.manifest.get("warnings") or []]
        return _render(
            "page.html",
            run=run,
            status=facts.STATUS.get(run.status, run.status),
            subject=facts.subject(run),
            headline=facts.headline(run),
            findings=facts.findings(run),
            next_steps=facts.next_steps(run),
            error=run.manifest.get("error"),
            metrics=metric_rows(run),
            samples=find_samples(run)[:20],
            evaluated=describe_rows(run),
            charts=draw_charts(charts_of(run)),
            updates=facts.update_table(run),
            warnings=[(line, 1) for line in facts.data_warnings(run)] + warnings,
            training=facts.training_facts(run),
            data=facts.data_rows(run),
            machine=facts.machine_facts(run),
            versions=facts.version_facts(run),
            lives=[_describe_life(life) for life in run.manifest.get("lives") or []],
            config=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else "",
        )


def render_comparison(runs: Sequence[Run]) -> str:
    """Return the page of several runs; every text from outside is escaped."""
    with reading(*runs):
        differences = facts.find_differences([run.config for run in runs])
        return _render(
            "comparison.html",
            title=_name_all([run.name for run in runs]),
            runs=[
                (run, facts.STATUS.get(run.status, run.status), facts.subject(run), number % 8)
                for number, run in enumerate(runs)
            ],
            results=[(heading, cells) for _, heading, cells in result_table(runs)],
            charts=draw_charts(charts_of_all(runs)),
            settings=[(name, [facts.write_setting(value) for value in values]) for name, values in differences.items()],
        )


def _render(template: str, **values: Any) -> str:
    script = (_FOLDER / "tooltip.js").read_text(encoding="utf-8")
    return render_page(_FOLDER / template, script, version=__version__, **values)


def _name_all(names: Sequence[str]) -> str:
    return f"{' · '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _describe_life(life: dict[str, Any]) -> list[str]:
    steps = f"{life.get('from_step') or 0:,} to {life.get('to_step') or 0:,}"
    started = str(life.get("started") or "").replace("T", " ").replace("+00:00", " UTC")
    return [started, steps, write_seconds(life.get("seconds") or 0.0), life.get("error") or life.get("status") or ""]
