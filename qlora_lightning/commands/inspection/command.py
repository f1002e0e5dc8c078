"""``qlora-lightning inspect``: the data as the model will see them, in the terminal and as a page."""

import sys
from collections.abc import Sequence
from typing import Any

from qlora_lightning.commands.options import OptionParser, check_output, quiet_lightning
from qlora_lightning.support.console import say, terminal
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import write_whole

_SPLITS = ("train", "val", "test", "predict")
_DESCRIPTION = """Report on the data of a config, and show rows as the model sees them. No model is loaded.

The config is the one that `fit` takes, or the config.yaml of a run folder. Every key of it can be given on the command
line, as for `fit`: --data.max_length 512, --trainer.devices 4."""
_EPILOG = """examples:
  qlora-lightning inspect --config configs/quickstart.yaml
  qlora-lightning inspect --config configs/quickstart.yaml --row 17 --row 23
  qlora-lightning inspect --config configs/quickstart.yaml --split val --longest --html data.html

The exit code is 2 if `fit` would stop at bad rows (`on_bad_row: error`)."""


def main(argv: Sequence[str]) -> int:
    """Report on the data of a config; return the exit code."""
    parser = OptionParser("inspect", _DESCRIPTION, _EPILOG, fit=True)
    add = parser.add_argument
    add("--split", choices=_SPLITS, help="report on this split only (default: all; rows are shown from the first)")
    row_help = "show the row in line N, or FILE:N, as messages name it; may be repeated"
    add("--row", action="append", default=[], metavar="N", help=row_help)
    add("--longest", action="store_true", help="show the longest row")
    add("--html", metavar="FILE", help="write what is printed as a page, with its colours, too")
    add("--force", action="store_true", help="overwrite a file that is there already")
    options, fit_options = parser.parse_known_args(argv)
    page = check_output("--html", options.html, options.force)
    # here, so that --help and mistakes answer at once
    from qlora_lightning.commands.inspection.overview import print_inspection
    from qlora_lightning.commands.training import QLoRACLI

    with quiet_lightning():
        run = QLoRACLI(fit_options)
        data: Any = run.datamodule
        data.lenient = True  # bad rows are listed, and the others prepared
        data.setup()
        splits = [name for name in _SPLITS if name in data.reports and options.split in (None, name)]
        if not splits:
            raise UserError(f"There are no rows to inspect: data.{options.split or 'train'} names no file.")
    console = terminal(record=page is not None)
    print_inspection(data, splits, run.config, console, places=options.row, longest=options.longest)
    if page is not None:
        write_whole(page, console.export_html())
        say(f"\nPage: {page}")
    sys.stdout.flush()
    for split in splits:
        data.reports[split].check(skip_bad=data.on_bad_row == "skip")
    return 0
