"""``qlora-lightning inspect``: the data as the model will see them, in the terminal and as a page."""

import sys
from collections.abc import Sequence
from pathlib import Path

import lightning
from rich.console import Console

from qlora_lightning.commands.inspection.arguments import make_data_module, parse
from qlora_lightning.commands.inspection.facts import inspect_data
from qlora_lightning.commands.inspection.page import is_page, render_page
from qlora_lightning.commands.inspection.terminal import print_inspection
from qlora_lightning.commands.options import check_output, quiet_lightning, write_output
from qlora_lightning.support.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Report on the data of a config; return the exit code."""
    options, config = parse(argv)
    page = None
    if options.html is not None:  # checked before a second is spent
        if not options.html.lower().endswith((".html", ".htm")):
            raise UserError(f"--html {options.html}: expected a file name that ends in .html.")
        file = Path(options.html)
        page = check_output("--html", file, options.force or (file.is_file() and is_page(file)))
    if config.seed is not False:  # the split by val_fraction depends on it
        lightning.seed_everything(None if config.seed is True else config.seed, verbose=False)
    data = make_data_module(config)
    bad_rows_stop, data.lenient = data.on_bad_row == "error", True  # here they are listed, and the rest goes on
    with quiet_lightning():
        found = inspect_data(data, config, options)
    print_inspection(found, Console(highlight=False))
    if page is not None:
        write_output(page, render_page(found))
        print(f"\nPage: {page}")
    sys.stdout.flush()
    bad = [f"{split.report.bad_rows:,} in {split.name}" for split in found.splits if split.report.bad_rows]
    if bad and bad_rows_stop:
        raise UserError(
            f"there are bad rows ({', '.join(bad)}), listed above: `fit` stops at them. Correct them, or leave them "
            "out with `on_bad_row: skip`."
        )
    for split in found.splits:
        split.report.check_left()
    return 0
