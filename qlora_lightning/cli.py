"""The command ``qlora-lightning``: finds the command, runs it, and words what went wrong.

Each command is imported when it is called, so that ``--help`` answers at once.
"""

import contextlib
import importlib
import logging
import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator, Sequence
from traceback import extract_tb
from types import FrameType

from qlora_lightning import __version__
from qlora_lightning.commands.config import read_configs
from qlora_lightning.support.console import drop_lost_output
from qlora_lightning.support.errors import ENDING_SIGNALS, LostProcess, TrainingStopped, UserError, nearest
from qlora_lightning.support.imports import quick_imports

# command: (module with `main(argv) -> int`, whether it wants the command's own name, one line of help)
_TRAINING = "qlora_lightning.commands.training"
COMMANDS: dict[str, tuple[str, bool, str]] = {
    "fit": (_TRAINING, True, "train adapters on a quantized base"),
    "validate": (_TRAINING, True, "loss, perplexity and token accuracy on the validation rows"),
    "test": (_TRAINING, True, "the same on the test rows"),
    "predict": (_TRAINING, True, "answer the rows of data.predict into predictions.jsonl"),
    "inspect": (
        "qlora_lightning.commands.inspection",
        False,
        "report on the data, and show rows as the model sees them",
    ),
    "plan": (
        "qlora_lightning.commands.plan",
        False,
        "show the model, its memory and the run's length, before loading",
    ),
    "evaluate": ("qlora_lightning.commands.evaluate", False, "base against adapters on the same rows"),
    "sweep-rank": ("qlora_lightning.commands.sweep", False, "double the rank until it stops paying, and say where"),
    "report": ("qlora_lightning.commands.report", False, "make the page of a run again, or compare several runs"),
    "merge": ("qlora_lightning.commands.merge", False, "merge an adapter into its base, checked, for any tool to load"),
    "chat": ("qlora_lightning.commands.chat", False, "talk to an adapter, or ask it once with --prompt"),
    "cache": (
        "qlora_lightning.commands.cache",
        False,
        "list or clear bases, samples and kernels that are kept on disk",
    ),
    "recipes": (
        "qlora_lightning.commands.recipes",
        False,
        "list the configs that travel with the package, or copy one",
    ),
}
_HELP = """usage: qlora-lightning COMMAND [options]

QLoRA fine-tuning of LLaMA models: a frozen base in 4 or 8 bits, small adapters trained on top.

commands:
{commands}

  qlora-lightning COMMAND --help explains a command, --debug shows the traceback of an error.
  To begin:

  qlora-lightning recipes copy quickstart
  qlora-lightning fit --config configs/quickstart.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 the user's mistake, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<10} {text}" for name, (_, _, text) in COMMANDS.items())
        print(_HELP.format(commands=lines), end="")
        return 0
    if arguments[0] == "--version":
        print(f"qlora-lightning {__version__}")
        return 0
    _quiet_libraries()
    # before CUDA starts: batches of ever new lengths would leave holes in memory that is cut into fixed pieces
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode gets question marks, not a traceback
            stream.reconfigure(errors="replace")
    try:
        with _ending_at_signals():
            return _run(arguments)
    except TrainingStopped as stop:
        return int(str(stop.code))
    except KeyboardInterrupt:
        print("qlora-lightning: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if debug or _is_of_a_run(error):
            raise
        return _report(error)


def _is_of_a_run(error: Exception) -> bool:
    """Whether the Trainer was at work: such a run cannot be repeated for its traceback."""
    if isinstance(error, UserError | LostProcess):
        return False
    return any("/lightning/pytorch/trainer/" in frame.filename for frame in extract_tb(error.__traceback__))


def _report(error: Exception) -> int:
    """Print an error in a line, and return its exit code."""
    if isinstance(error, PermissionError) and error.filename is not None:
        error = UserError(f"{error.filename}: permission denied. Choose another path.")
    if isinstance(error, UserError | LostProcess):
        message = str(error)
    else:
        message = f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)"
    # of several processes, which mostly fail for the same reason, the first one says it all
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK") or 0)
    if rank:
        message = f"(process {rank}) {textwrap.shorten(message, 120, placeholder=' …')}"
    print(f"qlora-lightning: {message}", file=sys.stderr)
    return 2 if isinstance(error, UserError) else 1


@contextlib.contextmanager
def _ending_at_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, taking back what it has half written; a fit does better."""
    main = threading.current_thread() is threading.main_thread()
    taken = [number for number in ENDING_SIGNALS if main and signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGTERM:  # a shell and the system both send SIGHUP: a second one may not stop the cleaning
            signal.signal(number, signal.SIG_IGN)
        drop_lost_output()
        with contextlib.suppress(OSError):  # not print: the signal may have come inside one
            os.write(2, f"\nqlora-lightning: ended by {signal.Signals(number).name}.\n".encode())
        raise TrainingStopped(128 + number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _quiet_libraries() -> None:
    """Keep away what libraries say that a user of this command can do nothing about; in this process only."""
    # bitsandbytes offers a kernel from a hub at import
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Lightning's tip to install a product of its maker
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
    if not sys.stderr.isatty():  # bars of tqdm, as transformers' while it quantizes, would fill a log with fragments
        os.environ.setdefault("TQDM_DISABLE", "1")
    # By `python -W error`, or PYTHONWARNINGS. Nothing here warns by `warnings`, libraries do, some at each start: what
    # they warn of is shown, and ends no fit
    if any(option.startswith("error") for option in sys.warnoptions):
        warnings.simplefilter("default")
    # Lightning 2.6 on torch 2.13
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*deprecated")


def _run(arguments: list[str]) -> int:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("The current folder is no longer there: change to another.") from error
    command = arguments[0]
    if command not in COMMANDS:
        hint = nearest(command, COMMANDS) or f" Commands are {', '.join(COMMANDS)}."
        raise UserError(f"{command!r} is not a command.{hint}")
    read_configs(arguments)  # a misspelt name shows before seconds of imports
    module, wants_name, _ = COMMANDS[command]
    with quick_imports():
        found = importlib.import_module(module)
    code: int = found.main(arguments if wants_name else arguments[1:])
    return code
