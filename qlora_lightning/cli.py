"""The program ``qlora-lightning``: imports the command that is called, runs it, and reports errors."""

import contextlib
import ctypes
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from qlora_lightning.commands.config import expand_arguments, find_configs
from qlora_lightning.support.console import VisibleRecord, show_controls
from qlora_lightning.support.errors import NothingTrained, TrainingStopped, UserError, find_disk_fault, nearest
from qlora_lightning.version import __version__

COMMANDS = {
    "fit": ("fit", "train adapters on a quantized base"),
    "validate": ("fit", "report loss, perplexity and token accuracy on the validation rows"),
    "test": ("fit", "report the same on the test rows"),
    "predict": ("fit", "generate answers for the rows of data.predict, into predictions.jsonl"),
    "inspect": ("inspection", "check your data, and show rows as the model sees them"),
    "plan": ("plan", "estimate memory, steps and tokens before anything is loaded"),
    "evaluate": ("evaluate", "compare a base and its adapters on the same rows"),
    "sweep": ("sweep", "raise the rank until it stops helping, or search other settings"),
    "report": ("report", "rebuild the report page of a run, or compare several runs"),
    "merge": ("merge", "merge an adapter into its base, and check the result"),
    "chat": ("chat", "chat with an adapter, or send one message with --prompt"),
    "cache": ("cache", "list or clear cached bases, samples and kernels"),
    "recipes": ("recipes", "list the configs that ship with the package, or copy one"),
}
"""Name of a command: its module in ``qlora_lightning.commands``, which has a ``main``, and one line of help."""
_OPTIONS_OF_FIT = ("fit", "inspection", "plan", "evaluate", "sweep", "merge")
_TRAINING = ("fit", "sweep")  # too long to repeat for a traceback, which they show at once
_CODE = re.compile(  # a setting that may name a class or function, as an option or in YAML, and the module of the name
    r"(?:^|[\s{,\"'.-])(?:class_path|format|optimizer|model|data|callbacks|logger|plugins|profiler|strategy)"
    r"[\"']?\+?(?:\s*[:=]|\s)[\s\[\"'-]*([^\W\d]\w*)(?:\.[^\W\d]\w*)+(?=[\s\"',}\]]|$)",
    re.MULTILINE,
)
_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".yaml", ".yml", ".gguf")  # no names of code
_HELP = """usage: qlora-lightning COMMAND [options]

QLoRA fine-tuning of LLaMA and related models: small adapters on a 4-bit or 8-bit base.

commands:
{commands}

  Run qlora-lightning COMMAND --help for details. Add --debug to see the traceback of an error.
  Get started:

  qlora-lightning recipes copy quickstart
  qlora-lightning fit --config configs/quickstart.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed or trained nothing, 2 explained, 128 + N signal N."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP.format(commands="\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())), end="")
        return 0
    if arguments[0] == "--version":
        print(f"qlora-lightning {__version__}")
        return 0
    _prepare_process()
    try:
        _find_own_code(arguments)
        with _logging_to_terminal():
            return _run(arguments)
    except TrainingStopped as stop:
        return int(str(stop.code))
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise  # --help; Lightning makes a SystemExit of Ctrl-C
        print("qlora-lightning: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        user_message = _find_user_message(error)
        module_name, _ = COMMANDS.get(arguments[0], ("", ""))
        if debug or (user_message is None and module_name in _TRAINING):
            raise
        message = user_message or f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)"
        print(f"qlora-lightning: {show_controls(message)}", file=sys.stderr)
        return 1 if user_message is None or isinstance(error, NothingTrained) else 2


def _run(arguments: list[str]) -> int:
    if arguments[0] not in COMMANDS:
        hint = nearest(arguments[0], COMMANDS) or f" Commands are {', '.join(COMMANDS)}."
        raise UserError(f"{arguments[0]!r} is not a command.{hint}")
    module_name, _ = COMMANDS[arguments[0]]
    if module_name == "fit" and {"-h", "--help"} & {*arguments}:
        importlib.import_module("qlora_lightning.commands.help").show_help(arguments[0])
    if module_name in _OPTIONS_OF_FIT:  # a wrong key is rejected before slow imports
        expand_arguments(arguments[1:], has_own_options=module_name != "fit")
    module = importlib.import_module(f"qlora_lightning.commands.{module_name}")
    return int(module.main(arguments if module_name == "fit" else arguments[1:]))


def _find_user_message(error: BaseException) -> str | None:
    """Return the message of a user's mistake, which a library may have wrapped; None for any other error."""
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError) and error.filename is not None:
        return f"{error.filename}: {str(error.strerror).lower()}. Choose another path."
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    if cause is not None:
        return str(cause)
    fault = find_disk_fault(error)
    return None if fault is None else f"{fault}. Make room, or choose another path."


@contextlib.contextmanager
def _logging_to_terminal() -> Iterator[None]:
    """Show what our own code logs, while a command runs, and control characters in what any library logs."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger, usual_record = logging.getLogger("qlora_lightning"), logging.getLogRecordFactory()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.setLogRecordFactory(VisibleRecord)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logging.setLogRecordFactory(usual_record)


def _find_own_code(arguments: Sequence[str]) -> None:
    """Let Python search the current folder if the user names a class or function in it.

    Only then: in a folder from elsewhere a file may have the name of any module that a library tries to import.
    """
    files, folder = [Path(name).expanduser() for name in find_configs(arguments)], os.getcwd()
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    text = "\n".join([" ".join(arguments), *texts])
    names = [match[1] for match in _CODE.finditer(text) if not match[0].endswith(_FILES)]
    absent = [name for name in names if name not in sys.modules and find_spec(name) is None]
    if any(PathFinder.find_spec(name, [folder]) for name in absent):
        sys.path.append(folder)


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep freed blocks for the next ones of their size; without glibc do nothing.

    A step on a CPU asks for the same blocks again and again. Fresh pages from the system must be zeroed first: an
    element-wise operation on a few MiB takes ten times as long then (measured).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        if not mallopt(mmap_threshold, 1 << 28):  # larger than any tensor of a step but a very long batch's
            mallopt(mmap_threshold, 1 << 25)  # the maximum of an older glibc
        mallopt(trim_threshold, -1)  # never


def _prepare_process() -> None:
    """Set the environment before libraries are imported, and silence log lines of theirs that help nobody."""
    # before CUDA starts: in segments of fixed size, batches of varying lengths fragment the memory
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # by default GNU's OpenMP threads spin for milliseconds at each barrier, on a core that another thread may need:
    # beside other programs a step then takes ten times as long (measured)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    _keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode gets question marks, not a traceback
            stream.reconfigure(errors="replace")
    # a list of absent devices, a tip to install a product, limits of 100 %
    unwanted = re.compile(r"GPU available|TPU available|💡|`Trainer\(limit_\w+=1\.0\)")
    lightning_logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning_logger.addFilter(lambda record: not unwanted.match(str(record.msg)))
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # the config has the seed
    if not sys.stderr.isatty():  # tqdm's bars, such as transformers' when it quantizes, would fill a log with fragments
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Lightning 2.6 on torch 2.13
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*deprecated")
