"""What can be refused before anything is measured: afterwards it would cost an hour."""

import argparse
import importlib.util
from pathlib import Path

import torch

from qlora_lightning.errors import UserError
from tests.benchmarks.report import check_file
from tests.benchmarks.shape_8b import check_folder


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse what would fail at the end.

    Raises:
        UserError: a file cannot be written, or something that an option needs is not there.
    """
    for option, file in (("--json", arguments.json), ("--plot", arguments.plot)):
        if file is not None:
            check_file(option, file)
    if arguments.plot is not None:
        _check_plot(arguments.plot)
    if arguments.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("--accelerator gpu: torch finds no CUDA device here; use --accelerator cpu.")
    if arguments.llama_8b is not None:
        check_folder(arguments.llama_8b, arguments.llama_8b_layers)


def _check_plot(file: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib, which is not installed: `pip install matplotlib`.")
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in kinds:
        raise UserError(
            f"--plot {file}: expected a name that ends in one of {', '.join(f'.{kind}' for kind in kinds)}."
        )
