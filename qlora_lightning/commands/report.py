"""``qlora-lightning report``: the page of a run again, or several runs side by side."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from qlora_lightning.commands.options import (
    OptionParser,
    add_json_option,
    check_output,
    tables_beside,
    write_json,
    write_output,
)
from qlora_lightning.report.facts import find_differences
from qlora_lightning.report.page import MARK, NAME, render_comparison, render_run
from qlora_lightning.report.results import find_results, main_score, result_table
from qlora_lightning.report.run import Run, name_runs, read_run, reading
from qlora_lightning.support.errors import UserError

_FORMAT, _VERSION = "qlora_lightning report", 1
_SEVERAL = Path("comparison.html")
_DESCRIPTION = """Make the report of a run again, from what its folder holds now, or compare several runs.

The page is one file that needs no network: curves, base against adapter, samples, data, versions, and the command to
reproduce. With several runs it holds the curves of all in one picture, and the settings and results that differ."""
_EPILOG = """examples:
  qlora-lightning report runs/quickstart
  qlora-lightning report runs/a runs/b --out a-and-b.html --json a-and-b.json

RUN is what trainer.default_root_dir of a fit was; one that is still going will do. Without --out the page of one run
is its report.html, that of several is comparison.html here. A file that is no page of ours is kept, unless --force."""
_TABLE = ("val_loss", "test_loss", "evaluated_loss", "tokens_per_second", "peak_memory_gib", "minutes")
_HEADING, _COLUMN = 24, 14  # characters for what a figure is called, and for a run beside it


def main(argv: Sequence[str]) -> int:
    """Write the page of one run or several; return the exit code.

    Raises:
        UserError: A folder holds no run, a file of it is damaged, or a file cannot be written or would be lost.
    """
    options = _parse(argv)
    folders = _distinct(options.runs)
    runs = [read_run(folder, name) for folder, name in zip(folders, name_runs(folders), strict=True)]
    page = folders[0] / NAME if len(folders) == 1 else _SEVERAL
    page = page if options.out is None else Path(options.out)
    check_output("--out", page, options.force or (page.is_file() and _is_page(page)))
    figures = check_output("--json", options.json, options.force)
    rendered = render_run(runs[0]) if len(runs) == 1 else render_comparison(runs)
    console = Console(highlight=False)
    with tables_beside(figures):
        with reading(*runs):
            tables = list(_tables(runs, console.width))
        for table in tables:
            console.print(table)
        write_output(page, rendered)
        if figures is not None:
            write_json(figures, summarize(runs))
        console.print(f"Page: {page}", markup=False, soft_wrap=True)
    return 0


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Gather figures and settings of runs, in the form of the JSON; names of figures end in their units."""
    return {
        "format": _FORMAT,
        "format_version": _VERSION,
        "runs": [
            {
                "folder": str(run.folder),
                "name": run.name,
                "status": run.status,
                "results": find_results(run),
                "config": dict(run.config),
            }
            for run in runs
        ],
        "differing_settings": find_differences([run.config for run in runs]) if len(runs) > 1 else {},
    }


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    options, unknown = _parser().parse_known_args(argv)
    if unknown:
        raise UserError(f"There is no option {unknown[0]}. See `qlora-lightning report --help`.")
    if not options.runs:
        raise UserError("Name a run folder, or several: `qlora-lightning report runs/quickstart`.")
    return options


def _parser() -> OptionParser:
    usage = "qlora-lightning report RUN [RUN …] [--out FILE] [--json FILE] [--force]"
    parser = OptionParser("report", _DESCRIPTION, _EPILOG, usage)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="FILE", help="write the page there")
    add_json_option(parser)
    return parser


def _distinct(names: Sequence[str]) -> list[Path]:
    """Give each folder once, however it was spelt."""
    return list({Path(name).resolve(): Path(name) for name in reversed(names)}.values())[::-1]


def _is_page(file: Path) -> bool:
    with file.open(encoding="utf-8", errors="replace") as handle:
        return MARK in handle.read(1000)


def _tables(runs: Sequence[Run], width: int) -> Iterator[Table]:
    """Yield the most important figures, a line each and a column for each run; of many runs several tables."""
    names = {*_TABLE, *(main_score(run) for run in runs)}
    figures = [(heading, cells) for name, heading, cells in result_table(runs) if name in names]
    beside = max(1, (width - _HEADING) // _COLUMN)
    for first in range(0, len(runs), beside):
        places = range(first, min(first + beside, len(runs)))
        shown = [runs[place] for place in places]
        table = Table("run", *(Column(escape(run.name), justify="right", overflow="fold") for run in shown))
        table.add_row("status", *(_mark(run.status, run.status != "finished", "yellow") for run in shown))
        for heading, cells in figures:
            table.add_row(heading, *(_mark(*cells[place], "bold green") for place in places))
        yield table


def _mark(text: str, marked: bool, style: str) -> Text:
    return Text(text, style if marked else "")
