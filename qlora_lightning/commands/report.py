"""``qlora-lightning report``: the page of one run, or of several side by side."""

from collections.abc import Sequence
from pathlib import Path

from qlora_lightning.commands.options import OptionParser, add_json_option, check_output, json_output
from qlora_lightning.report import read_run, render_report
from qlora_lightning.report.figures import figure_table, find_figures
from qlora_lightning.report.page import find_differences
from qlora_lightning.support.console import make_table, say
from qlora_lightning.support.errors import UserError, bounded
from qlora_lightning.support.files import PAGE, write_whole

_DESCRIPTION = """Rebuild the report of a run from its folder, or compare several runs.

The page is one file that needs no network. It has curves, base against adapter, samples, data, versions, and the
command to reproduce the run. For several runs, it has all curves in one chart, and the settings and results that
differ."""
_EXAMPLES = """examples:
  qlora-lightning report runs/quickstart
  qlora-lightning report runs/a runs/b --out a-and-b.html --json a-and-b.json

RUN is the trainer.default_root_dir of a fit, which may still be training. Without --out, the page of one run is its
report.html, and that of several runs is comparison.html in the current folder. An earlier page is overwritten."""


def main(argv: Sequence[str]) -> int:
    """Write the page of one run or several; return the exit code."""
    parser = OptionParser("report", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page to this file")
    add_json_option(parser)
    options = parser.parse_args(argv)
    paths = ", ".join(map(str, options.runs))
    with bounded(f"{paths}: no report can be made", "run_folder.cost"):
        runs = [read_run(folder, str(folder) if len(options.runs) > 1 else None) for folder in options.runs]
        html = render_report(runs)
    default_page = runs[0].folder / PAGE if len(runs) == 1 else Path("comparison.html")
    page = check_output("--out", options.out, options.force) or default_page
    is_kept = len(runs) > 1 and page == default_page and page.is_file()
    if is_kept and b'content="qlora_lightning report"' not in page.read_bytes():
        raise UserError(f"{page} is another page: move it away, or name a file by --out.", "comparison.other")
    with json_output(options) as figures:
        rows = [["status", *(run.status for run in runs)], *figure_table(runs)[1]]
        say(make_table(("run", *(run.name for run in runs)), rows))
        write_whole(page, html)
        say(f"Page: {page}")
        figures |= {"format": "qlora_lightning report", "format_version": 1}
        figures["runs"] = [
            {
                "folder": str(run.folder),
                "name": run.name,
                "status": run.status,
                "results": {name: figure.value for name, figure in find_figures(run).items()},  # units end the names
                "config": dict(run.config),
            }
            for run in runs
        ]
        figures["differing_settings"] = find_differences([run.config for run in runs])
    return 0
