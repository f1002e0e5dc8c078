"""``qlora-lightning lr-find``: Lightning's learning-rate finder on a config, leaving nothing behind."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from qlora_lightning.commands.input_files import find_inputs
from qlora_lightning.commands.json_output import (
    check_distinct,
    check_output_file,
    json_file,
    tables_beside,
    write_json,
    write_output,
)
from qlora_lightning.commands.options import OptionParser
from qlora_lightning.commands.options import quiet_lightning
from qlora_lightning.support.errors import UserError

_DESCRIPTION = """Train a config for some steps with a learning rate that rises from one to the next, and suggest one.

This is Lightning's finder; it ends where the loss is four times its lowest. Suggested is the rate at which the smoothed
training loss falls most steeply over the logarithm of the rate. The config's own warm-up and schedule wait,
accumulation counts as in training. Every other option is one of `fit`. It runs on one device, validates nothing and
writes nothing but what --json and --plot name."""
_EPILOG = """examples:
  qlora-lightning lr-find --config configs/quickstart.yaml --steps 16
  qlora-lightning lr-find --config configs/quickstart.yaml --steps 16 --max-lr 1e-2 --plot lr.png --json lr.json

A suggestion is a start: `qlora-lightning sweep-rank --learning-rates …` compares rates by whole trainings."""
_PICTURES = (".png", ".svg", ".pdf")
_LEAST_STEPS = 13  # Lightning leaves out the first ten losses and the last one, and needs two


def main(argv: Sequence[str]) -> int:
    """Search; return the exit code.

    Raises:
        UserError: A key or value is wrong, or the search ended too early to suggest anything.
    """
    own, rest = _parser().parse_known_args(argv)
    if own.steps < _LEAST_STEPS:
        raise UserError(f"--steps is {own.steps}: expected {_LEAST_STEPS} or more.")
    if not 0 < own.min_lr < own.max_lr < float("inf"):
        given = f"--min-lr is {own.min_lr:g} and --max-lr {own.max_lr:g}"
        raise UserError(f"{given}: expected positive numbers, the first the smaller one.")
    inputs = find_inputs(rest)
    file = json_file(own.json, ("learning_rate", "loss", "suggestion"), inputs)
    picture = _picture(own.plot, inputs)
    check_distinct({"--json": file, "--plot": picture})

    # here, so that --help and mistakes answer at once
    from qlora_lightning.commands.lr_find.report import draw_search, print_search
    from qlora_lightning.commands.lr_find.search import search

    with tables_beside(file):
        with tempfile.TemporaryDirectory(prefix="qlora-lightning-lr-find-") as folder, quiet_lightning():
            found = search(rest, folder, own.min_lr, own.max_lr, own.steps)
        print_search(found)
    if file is not None:
        write_json(file, found)
    if picture is not None:
        write_output(picture, draw_search(found, picture.suffix[1:]))
    if found["suggestion"] is None:
        raise UserError(
            f"The search ended after {len(found['loss'])} steps, too early to suggest a rate: the loss diverged. Lower "
            "--min-lr and --max-lr."
        )
    return 0


def _picture(name: str | None, inputs: Sequence[Path]) -> Path | None:
    if name is None:
        return None
    file = Path(name)
    if file.suffix not in _PICTURES:
        raise UserError(f"--plot {name}: expected a file that ends in .png, .svg or .pdf.")
    return check_output_file("--plot", file, lambda file: file.suffix in _PICTURES, inputs)


def _parser() -> OptionParser:
    usage = "qlora-lightning lr-find --config FILE [--steps N] [--min-lr X] [--max-lr X] [options of fit]"
    parser = OptionParser("lr-find", _DESCRIPTION, _EPILOG, usage)
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="optimizer steps (default: 100)")
    parser.add_argument(
        "--min-lr", type=float, default=1e-6, metavar="X", help="rate of the first step (default: 1e-6)"
    )
    parser.add_argument("--max-lr", type=float, default=1e-1, metavar="X", help="rate of the last one (default: 0.1)")
    parser.add_argument("--plot", metavar="FILE", help="draw the losses into a .png, .svg or .pdf")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    return parser
