"""What ends a command early: a mistake in the user's input, a file that costs too much, or a signal."""

import contextlib
import difflib
import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


class UserError(ValueError):
    """A mistake in the user's input: a config value, a file, a checkpoint.

    The message is one clear sentence or two: what was expected, what was found (file and line, key, value) and what
    to do. The command line prints it without a traceback and exits with code 2.

    Attributes:
        key: The setting, option or key of a file at fault, such as ``model.rank``, or a name for what is, such as
            ``checkpoint.damaged``. It stays when the words change; empty for an error that nobody tells apart yet.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class Diverged(UserError):
    """A loss or gradient is NaN or infinite: the run ends, and earlier checkpoints stay."""


class NothingTrained(UserError):
    """A fit has ended without a step, though it had steps to take; the command's exit code is 1."""


def describe_error(error: BaseException) -> str:
    """Return the class and the words of a library's error, in one line, to quote it in a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].removesuffix(": ")


@contextlib.contextmanager
def explaining(message: str, key: str = "") -> Iterator[None]:
    """Turn a library's error, whatever its class, into a UserError that quotes it; let others pass."""
    try:
        yield
    except (Exception, OutOfTime) as error:
        _explain(error, message, key, any_error=True)


def _explain(error: BaseException, message: str, key: str, any_error: bool) -> NoReturn:
    """Raise an error as a UserError: of what costs too much in a bounded block, or any but an own and of memory."""
    cost = _describe_cost(error)
    if isinstance(error, UserError) or not (cost or (any_error and not is_out_of_memory(error))):
        raise error
    raise UserError(f"{message} ({cost or describe_error(error)}).", key) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: for a GPU torch has an exception class, for a CPU only messages of torch and oneDNN."""
    torch = sys.modules.get("torch")  # before it is imported no error is its own
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    messages = (
        *("DefaultCPUAllocator: can't allocate memory", "could not create a primitive"),
        *("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory"),  # cuBLAS's workspace, pinned memory
        *("CUBLAS_STATUS_NOT_INITIALIZED", "Triton Error [CUDA]: out of memory"),  # cuBLAS's handle, a kernel's code
        "CUDA out of memory",  # in a region while it is compiled: the error is the compiler's
    )
    return isinstance(error, kinds) or any(message in str(error) for message in messages)


# ---- what a file from elsewhere may cost -----------------------------------------------------------------------------

MOST_GIB, MOST_SECONDS = 4, 60
_lock, _n_bounded = threading.Lock(), 0  # blocks, of all threads


class OutOfTime(BaseException):
    """A bounded block takes too long; no ``Exception``, which a library might swallow."""


@contextlib.contextmanager
def bounded(message: str, key: str, *, timed: bool = True, explains: bool = False) -> Iterator[Callable[[str], None]]:
    """Bound what a block costs: 4 GiB more of private memory, and 60 seconds without progress.

    A small file may unpack to many GB, and a short pattern or template may never end. What costs more is a UserError,
    by the innermost message, that of :func:`explaining` included; with ``explains`` any error of a library is. After
    the block all is as before. It may be inside another, whose seconds continue then.

    A generator must not yield inside a block, except as this one does. Nothing may encode there: when memory ends, a
    tokenizer in Rust aborts the process. Memory is bounded on Linux alone, and time in the main thread alone, not on
    Windows.

    Yields:
        A function to call before each further part, with its message: the seconds begin again.
    """
    global _n_bounded
    timed = timed and hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def begin(part: str) -> None:
        nonlocal message
        message = part
        if timed:  # once more every second, should a library have swallowed it
            signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS, 1)

    with _lock:
        restore_memory = _do_nothing if _n_bounded else _limit_memory()
        _n_bounded += 1
    try:
        if timed:
            timer, handler = signal.setitimer(signal.ITIMER_REAL, 0), signal.signal(signal.SIGALRM, _interrupt)
        try:
            begin(message)
            yield begin
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, *timer)
    except (Exception, OutOfTime) as error:
        _explain(error, message, key, any_error=explains)
    finally:
        with _lock:
            _n_bounded -= 1
            restore_memory()


def _interrupt(*_: object) -> None:
    raise OutOfTime


def _do_nothing() -> None: ...


def _limit_memory() -> Callable[[], object]:
    """Let the private memory of the process grow by so much; return what restores the limit before."""
    try:
        import resource

        size = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    except (ImportError, OSError):  # Windows; macOS
        return _do_nothing
    before = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [size + int(MOST_GIB * 2**30), *(limit for limit in before if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), before[1]))
    return partial(resource.setrlimit, resource.RLIMIT_DATA, before)


def _describe_cost(error: BaseException) -> str:
    """Return what costs too much in a bounded block; empty for any other error."""
    if isinstance(error, OutOfTime):
        return f"it takes more than {MOST_SECONDS} seconds: make it simpler, or leave it out"
    if _n_bounded and (is_out_of_memory(error) or getattr(error, "errno", None) == errno.ENOMEM):
        return f"it takes more than {MOST_GIB} GiB of memory, or than there is: make it smaller, or leave it out"
    return ""


def find_disk_fault(error: BaseException) -> BaseException | None:
    """Return the error of a full or failing disk, which torch and safetensors wrap in others."""
    texts = [f"(os error {code})" for code in _DISK_FAULTS]  # of libraries in Rust
    fault: BaseException | None = error
    while fault is not None:
        if getattr(fault, "errno", None) in _DISK_FAULTS or any(text in str(fault) for text in texts):
            return fault
        fault = fault.__cause__ or fault.__context__
    return None


def reason_of(error: BaseException) -> str:
    """Return what an error says when memory ran out, in a line without the advice that torch adds for a GPU."""
    return str(error).partition("\n")[0].partition(" Of the allocated memory")[0].rstrip(".")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` with the most similar known name, to end a message; empty if none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


class TrainingStopped(SystemExit):
    """A signal asked a command to stop, and everything is saved: nothing failed.

    A ``SystemExit``, so that a script that trains ends with the code that a shell or a scheduler expects of the signal:
    130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
