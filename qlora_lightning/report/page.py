"""The report as one self-contained HTML page: of one run, or of several side by side."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from qlora_lightning import __version__
from qlora_lightning.report import figures, sections
from qlora_lightning.report.assessment import assess
from qlora_lightning.report.charts import COLOURS, charts_of, draw_charts
from qlora_lightning.report.run_files import Run, read_run
from qlora_lightning.support.console import show_controls
from qlora_lightning.support.files import PAGE, write_whole


def write_run_page(folder: Path) -> Path:
    """Write ``report.html`` into a run folder."""
    write_whole(folder / PAGE, render_report([read_run(folder)]))
    return folder / PAGE


def is_report(file: Path) -> bool:
    """Whether a file is a page of ours."""
    return b'content="qlora_lightning report"' in file.read_bytes()


def render_report(runs: Sequence[Run]) -> str:
    """Return the page of one run, or of several side by side; every text from outside is escaped."""
    import jinja2  # here, so that a fit starts without it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,  # a manifest may lack anything
        finalize=lambda value: show_controls(value) if type(value) is str else value,
    )
    environment.filters["pairs"] = lambda facts: ", ".join(f"{name} {fact}" for name, fact in (facts or {}).items())
    environment.filters["yaml"] = lambda config: yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return environment.get_template("report.html").render(
        runs=runs,
        charts=draw_charts(charts_of(runs)),
        colours=COLOURS,
        assessment=assess(runs[0]) if len(runs) == 1 else None,
        figures=figures,
        sections=sections,
        version=__version__,
    )
