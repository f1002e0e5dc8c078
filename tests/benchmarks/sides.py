"""The two sides as fresh processes: each run imports, loads and trains on its own."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qlora_lightning.errors import UserError
from tests.benchmarks.figures import Figures, read_figures

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Side:
    """One side of the comparison.

    Attributes:
        name: ``ours`` or ``peer``, the name of its module here.
        python: the interpreter that runs it.
        data: the file of its rows.
    """

    name: str
    python: str
    data: Path

    def measure(self, base: Path, threads: int, gradient_checkpointing: bool) -> Figures:
        """Run one epoch in a process of its own.

        Raises:
            RuntimeError: the process failed; the message holds what it said.
        """
        command = [self.python, "-m", f"tests.benchmarks.{self.name}", str(base), str(self.data)]
        command += ["--gradient-checkpointing"] if gradient_checkpointing else []
        # By the environment, so that every library's pool of threads hears of it.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
            raise RuntimeError(f"{self.name} failed (exit code {done.returncode}). Its last words:\n{said}")
        return read_figures(done.stdout)


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
