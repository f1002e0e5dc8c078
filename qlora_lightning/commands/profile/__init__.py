"""``qlora-lightning profile``: where the time and the memory of a training step go, by part."""

import functools
import os
import tempfile
from collections.abc import Sequence

from rich.console import Console

from qlora_lightning.commands.input_files import find_inputs
from qlora_lightning.commands.json_output import json_file, tables_beside, write_json
from qlora_lightning.commands.options import OptionParser
from qlora_lightning.commands.options import quiet_lightning
from qlora_lightning.support.errors import UserError

_DESCRIPTION = """Run a few optimizer steps of a config under torch's profiler, and say where their time and memory go.

The config is the one that `fit` takes, and so is every other option: --model.fast false, --data.batch_size 4.
It runs on one device, validates nothing and writes nothing but what --json names."""
_EPILOG = """examples:
  qlora-lightning profile --config configs/quickstart.yaml
  qlora-lightning profile --config configs/quickstart.yaml --steps 2 --gradient_checkpointing true --json profile.json

Two steps come first: one warms up, of the other the memory is measured. Operators outside the named parts, and the
time between operators, count as the part that calls them. Calls are how often a step enters a part."""


def main(argv: Sequence[str]) -> int:
    """Profile a config; return the exit code.

    Raises:
        UserError: A key or value is wrong, or no step could be profiled.
    """
    own, rest = _parser().parse_known_args(argv)
    if own.steps < 1:
        raise UserError(f"--steps is {own.steps}: expected 1 or more.")
    file = json_file(own.json, ("ms_per_step", "time", "memory"), find_inputs(rest))

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch: its profiler tells of each start and stop
    # here, so that --help and mistakes answer at once
    from qlora_lightning.commands import training
    from qlora_lightning.commands.profile.fit import ProfileCLI
    from qlora_lightning.commands.profile.recorder import StepRecorder
    from qlora_lightning.commands.profile.report import print_summary, summarize

    recorder = StepRecorder(own.steps)
    with tables_beside(file):
        with tempfile.TemporaryDirectory(prefix="qlora-lightning-profile-") as folder, quiet_lightning():
            use = functools.partial(ProfileCLI, recorder=recorder, folder=folder)
            training.main(["fit", *rest], use, name="profile")
        if not recorder.recorded:
            raise UserError("No step was profiled: the run ended before. trainer.limit_train_batches must not be 0.")
        summary = summarize(recorder)
        print_summary(summary, Console(highlight=False))
    if file is not None:
        write_json(file, summary)
    return 0


def _parser() -> OptionParser:
    usage = "qlora-lightning profile --config FILE [--steps N] [--json FILE] [options of fit]"
    parser = OptionParser("profile", _DESCRIPTION, _EPILOG, usage)
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="optimizer steps to profile (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    return parser
