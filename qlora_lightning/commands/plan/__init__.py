"""``qlora-lightning plan``: what a config trains, and the memory and steps that it takes, before it is loaded."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora_lightning.base.adapter_folder import find_adapter_folder
from qlora_lightning.commands.adapter_config import add_config
from qlora_lightning.commands.options import OptionParser, quiet_lightning
from qlora_lightning.commands.output import add_json_option, check_output, tables_beside, write_json
from qlora_lightning.support.errors import UserError

_DESCRIPTION = """Show the model of a config and plan its memory, steps and tokens before anything is loaded.

The config is the one that `fit` takes, and so is every other option: --model.rank 16, --data.batch_size 4. No weight
is read and nothing is fetched; the data are read where they are on this machine. Nothing is written but what --json
names. With --adapter it is planned to go on with that adapter; its run's config.yaml will do as config."""
_EPILOG = """examples:
  qlora-lightning plan --config configs/quickstart.yaml
  qlora-lightning plan --config configs/llama-3.1-8b-16gb.yaml --device-memory 16GiB --json plan.json
  qlora-lightning plan --adapter runs/quickstart/adapter

GB are 10^9 bytes, GiB 2^30. The device is that of trainer.accelerator; `auto` means a GPU where there is one or where
--device-memory is given. Figures for GPUs come from the same formulas, which were checked on CPUs only."""
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_UNITS |= {"tib": 2**40}


def main(argv: Sequence[str]) -> int:
    """Plan a config; return the exit code.

    Raises:
        UserError: A key or value is wrong, or the base's config is not on this machine.
    """
    own, rest = _parser().parse_known_args(argv)
    memory = None if own.device_memory is None else read_size(own.device_memory)
    file = check_output("--json", own.json, own.force)

    if own.adapter is not None:
        adapter = find_adapter_folder(own.adapter)
        rest = [*add_config(adapter, rest, needs_rows=False), "--model.adapter", str(adapter)]

    # here, so that --help and mistakes answer at once
    from qlora_lightning.commands import training
    from qlora_lightning.commands.plan.cli import PlanCLI

    with quiet_lightning(), tables_beside(file):
        use = functools.partial(_plan, memory=memory, file=file)
        training.main(["fit", *rest], functools.partial(PlanCLI, use=use), name="plan")
    return 0


def _plan(
    module: Any, data: Any, no_tokenizer: str | None, settings: dict[str, Any], memory: int | None, file: Path | None
) -> None:
    from qlora_lightning.commands.plan.make import make_plan
    from qlora_lightning.commands.plan.report import print_plan, summarize

    plan = make_plan(module, data, no_tokenizer, settings, memory)
    print_plan(plan, Console(highlight=False))
    if file is not None:
        write_json(file, summarize(plan))


def read_size(text: str) -> int:
    """Read a number of bytes with a unit: ``16GiB``, ``24 GB``.

    Raises:
        UserError: It is none.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    given = f"--device-memory is {text!r}" if len(text) <= 40 else f"--device-memory is {text[:39]!r}…"
    size = 0 if match is None or match[2] not in _UNITS else int(float(match[1]) * _UNITS[match[2]])
    if match is None or not size:
        raise UserError(f"{given}: expected a size with its unit, such as 16GiB or 24GB.")
    if not match[2] and size < _UNITS["mib"]:
        raise UserError(f"{given}, so many bytes: write the unit, such as {text.strip()}GiB.")
    return size


def _parser() -> OptionParser:
    usage = "qlora-lightning plan --config FILE [--adapter DIR] [options] [options of fit]"
    parser = OptionParser("plan", _DESCRIPTION, _EPILOG, usage)
    parser.add_argument("--adapter", metavar="DIR", help="adapter folder to go on with (model.adapter)")
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="memory of the device, such as 16GiB or 24GB (default: of this machine's GPU, or its own)",
    )
    add_json_option(parser)
    return parser
