"""The report as one HTML page that needs nothing beside itself: of one run, or of several side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning import __version__
from qlora_lightning.page import render_page
from qlora_lightning.report import facts
from qlora_lightning.report.charts import charts_of, draw_charts
from qlora_lightning.report.results import evaluation_table, figure_table, find_samples
from qlora_lightning.report.run import Run, read_run
from qlora_lightning.report.verdict import judge
from qlora_lightning.support.files import PAGE, write_whole


def write_run_page(folder: Path) -> Path:
    """Write ``report.html`` into a run folder.

    Raises:
        UserError: A file in it is damaged.
        OSError: The page cannot be written.
    """
    write_whole(folder / PAGE, render_report([read_run(folder)]))
    return folder / PAGE


def render_report(runs: Sequence[Run]) -> str:
    """Return the page of one run, or of several beside each other; every text from outside is escaped."""
    names = [run.name for run in runs]
    return render_page(
        Path(__file__).with_name("report.html"),
        title=f"{' · '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}",
        runs=[(run, facts.STATUS.get(run.status, run.status), facts.subject(run)) for run in runs],
        headline=facts.headline(runs[0]) if len(runs) == 1 else [],
        sections=_sections_of_one(runs[0]) if len(runs) == 1 else _sections_of_several(runs),
        version=__version__,
    )


def _sections_of_one(run: Run) -> list[tuple[str, str, Any]]:
    """Return the heading of each section, the kind that the template shows it as, and its content."""
    manifest, attempts, verdict = run.manifest, facts.attempt_table(run), judge(run)
    warnings = [(warning["text"], warning["count"]) for warning in manifest.get("warnings") or []]
    again = {"from the same working folder": manifest.get("reproduce"), "it was started by": manifest.get("command")}
    config = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else ""
    return [
        ("What ended it", "fault grave", [(manifest["error"], 1)] if manifest.get("error") else []),
        ("In short", "sentences", verdict.sentences),
        ("What to do next", "commands", facts.next_steps(run, verdict)),
        ("Curves", "charts", draw_charts(charts_of([run]))),
        ("Before and after", "table", evaluation_table(run)),
        ("Samples", "samples", find_samples(run)[:20]),
        ("What the adapter changes", "map", facts.update_map(run)),
        ("", "table", facts.update_table(run)),
        ("To look at", "fault", warnings),
        ("What was trained on what", "facts", facts.training_facts(run)),
        ("Data", "table", facts.data_table(run)),
        ("Machine", "facts", facts.machine_facts(run)),
        ("Starts", "table", attempts if len(attempts[1]) > 1 else None),
        ("Versions and fingerprints", "facts", facts.version_facts(run)),
        ("To do it again", "commands", [(purpose, command) for purpose, command in again.items() if command]),
        ("Config", "config", config),
    ]


def _sections_of_several(runs: Sequence[Run]) -> list[tuple[str, str, Any]]:
    return [
        ("Results", "table", figure_table(runs)),
        ("Curves", "charts", draw_charts(charts_of(runs))),
        ("Settings that differ", "table", facts.difference_table(runs)),
    ]
