"""What can be refused before anything is measured: afterwards it would cost an hour."""

import argparse
import importlib.util
from pathlib import Path

import torch

from qlora_lightning.commands.input_files import find_inputs
from qlora_lightning.commands.json_output import check_distinct, check_output_file, json_file
from qlora_lightning.support.errors import UserError
from tests.benchmarks.shape_8b import check_folder


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse what would fail at the end, or lose what is there.

    Raises:
        UserError: a file cannot be written, or is another's; or something that an option needs is not there.
    """
    inputs = find_inputs([arguments.data])
    arguments.json = json_file(arguments.json, ("setup", "runs"), inputs)
    if arguments.plot is not None:
        check_output_file("--plot", arguments.plot, _is_plot, inputs)
        _check_plot(arguments.plot)
    check_distinct({"--json": arguments.json, "--plot": arguments.plot})
    if arguments.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("--accelerator gpu: torch finds no CUDA device here; use --accelerator cpu.")
    if arguments.scaling and arguments.accelerator == "gpu":
        raise UserError("--scaling is measured on a CPU; leave it out with --accelerator gpu.")
    if arguments.llama_8b is not None:
        check_folder(arguments.llama_8b, arguments.llama_8b_layers)


def _is_plot(file: Path) -> bool:
    return b"matplotlib" in file.read_bytes().lower()  # it writes its name into what it draws


def _check_plot(file: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib, which is not installed: `pip install matplotlib`.")
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in kinds:
        raise UserError(
            f"--plot {file}: expected a name that ends in one of {', '.join(f'.{kind}' for kind in kinds)}."
        )
