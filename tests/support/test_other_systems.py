"""The package is imported, helps and trains without what only POSIX has: so do macOS and Windows."""

import os

from tests.processes import run_python

_PROGRAM = """
import importlib.util, os, select, signal, sys
from pathlib import Path

# Libraries have their own ways; what is hidden here is hidden from our modules.
import qlora_lightning.model  # bitsandbytes, as we import it
import torch, lightning.pytorch, transformers, peft, datasets, matplotlib, gguf, psutil, filelock, rich.progress
for name in [name for name in sys.modules if name.startswith("qlora_lightning")]:
    del sys.modules[name]

base, rows = sys.argv[1:]
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline"):
    sys.modules[name] = None  # Python refuses to import it
for module, names in (
    (os, ("sched_getaffinity", "register_at_fork", "fork", "getuid", "mkfifo", "killpg", "setsid")),
    (signal, ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "setitimer")),
    (select, ("poll",)),
):
    for name in names:
        delattr(module, name)
signal.valid_signals = lambda: {signal.SIGINT, signal.SIGTERM, signal.SIGABRT}
sys.platform = "darwin"  # by "win32" the standard library would look for modules of Windows
lightning.pytorch.trainer.connectors.signal_connector._IS_WINDOWS = True

import qlora_lightning
package = Path(qlora_lightning.__file__).parent
for file in sorted(package.rglob("*.py")):
    parts = file.relative_to(package.parent).with_suffix("").parts
    # Triton comes only with a torch for CUDA, Optuna with the extra `sweep`.
    needs = {"kernels": "triton", "sweep_study": "optuna"}.get(parts[-1])
    if needs is not None and importlib.util.find_spec(needs) is None:
        continue
    if parts[-1] != "__main__" and parts[1] != "recipes":  # a wheel's recipes hold scripts to copy, not modules
        importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
from qlora_lightning.cli import COMMANDS, main
from qlora_lightning.model.cpu.library import load_library
assert load_library() is None
assert main(["--help"]) == 0
sizes = ["--model.rank=2", "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.default_root_dir=run"]
assert main(["fit", f"--model.base={base}", f"--data.train={rows}", *sizes]) == 0
assert main(["report", "run"]) == 0
assert Path("run/adapter/adapter_model.safetensors").is_file()
"""


def test_every_module_is_imported_and_a_fit_runs_without_them(tiny_base, rows_file, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = run_python("-c", _PROGRAM, tiny_base, rows_file, cwd=tmp_path, env=environment)
    assert "usage: qlora-lightning COMMAND" in done.stdout
    assert "C++" not in done.stderr  # they are off without a word
