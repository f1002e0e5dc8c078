"""``qlora-lightning plan``: what a config trains, with its memory and steps, before anything is loaded."""

import re
from collections.abc import Sequence
from importlib import import_module

from qlora_lightning.commands.options import OptionParser, add_json_option, json_output, quiet_lightning
from qlora_lightning.support.console import terminal
from qlora_lightning.support.errors import UserError

_DESCRIPTION = """Show the model of a config, and plan its memory, steps and tokens before anything is loaded.

The config is the one that `fit` takes, and so is every other option: --model.rank 16, --data.batch_size 4. No weight
is read or fetched (a GGUF is unpacked once); the data are read if they are on this machine."""
_EPILOG = """examples:
  qlora-lightning plan --config configs/quickstart.yaml
  qlora-lightning plan --config configs/llama-3.1-8b.yaml --device-memory 16GiB --json plan.json

It says whether a step fits, with how many tokens at a time, and with or without gradient checkpointing; the exit code
is 1 if it does not. GB are 10^9 bytes, GiB 2^30. The device is that of trainer.accelerator; `auto` means a GPU if there
is one or if --device-memory is given. Of a CPU only what a step finds in memory is planned."""
_UNITS = {"mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}


def main(argv: Sequence[str]) -> int:
    """Plan a config; return the exit code."""
    parser = OptionParser("plan", _DESCRIPTION, _EPILOG, fit=True)
    memory_help = "memory of the device, such as 16GiB or 24GB (default: of this machine's GPU, or its own)"
    parser.add_argument("--device-memory", metavar="SIZE", help=memory_help)
    add_json_option(parser)
    options, fit_options = parser.parse_known_args(argv)
    memory = None if options.device_memory is None else read_size(options.device_memory)
    with json_output(options) as output, quiet_lightning():
        # here, so that --help and mistakes answer at once
        import_module("qlora_lightning.model")  # before the planner: bitsandbytes comes before PEFT

        from qlora_lightning.commands.plan.planner import plan_run, print_plan

        figures, model = plan_run(fit_options, memory)
        print_plan(figures, model, terminal())
        output.update(figures)
        return 0 if figures["memory"]["fits"] else 1


def read_size(text: str) -> int:
    """Read a number of bytes with a unit: ``16GiB``, ``24 GB``, ``81559 MiB``."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([mg]i?b)", text.strip().lower(), re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not size:
        raise UserError(f"--device-memory is {text[:40]!r}: expected a size with its unit, such as 16GiB or 24GB.")
    return size
