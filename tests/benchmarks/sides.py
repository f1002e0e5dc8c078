"""The two sides of the comparison, and how each is run."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_lightning.support.errors import UserError
from tests.benchmarks.children import ROOT, run_child
from tests.benchmarks.figures import Figures


@dataclass(frozen=True)
class Side:
    """One side of the comparison.

    Attributes:
        name: ``ours`` or ``peer``, the name of its module here.
        python: the interpreter that runs it.
        data: the file of its rows.
        base: folder of the base.
        accelerator: ``cpu`` or ``gpu``.
        threads: of its process.
        dtype: of the products: ``bf16``, ``fp16`` or ``fp32``.
    """

    name: str
    python: str
    data: Path
    base: Path
    accelerator: str
    threads: int
    dtype: str

    def measure(self, *options: str) -> Figures:
        """Run one epoch in a process of its own.

        Args:
            options: more for its command line: ``--gradient-checkpointing``, ``--max-steps=1``.

        Raises:
            RuntimeError: the process failed; the message holds what it said.
        """
        choices = ("--accelerator", self.accelerator, "--dtype", self.dtype)
        arguments: Sequence[str] = (str(self.base), str(self.data), *choices, *options)
        return Figures(**run_child(self.python, self.name, arguments, self.threads))


def has_trl(python: str) -> bool:
    """Tell whether an interpreter can import TRL.

    Raises:
        UserError: there is no such interpreter.
    """
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    try:
        return subprocess.run([python, "-c", look], cwd=ROOT, check=False).returncode == 0
    except OSError as error:
        raise UserError(f"--peer-python: {python} cannot be run: {error.strerror}.") from error
