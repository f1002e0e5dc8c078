"""What ends a command early: a mistake in the user's input, or a signal that asked training to stop."""

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator

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


def check_setting(key: str, value: object, is_valid: bool, expected: str) -> None:
    """Reject the value of a setting, by its YAML name, with what was expected."""
    if not is_valid:
        raise UserError(f"{key} is {value!r}: expected {expected}.", key)


def describe_error(error: BaseException) -> str:
    """Return the class and the words of a library's error, in one line, to quote it in a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].removesuffix(": ")


@contextlib.contextmanager
def explaining(message: str, key: str = "") -> Iterator[None]:
    """Turn a library's error, whatever its class, into a UserError that quotes it; let others pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"{message} ({describe_error(error)}).", key) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: for a GPU torch has an exception class, for a CPU only messages of torch and oneDNN."""
    import torch

    messages = (
        *("DefaultCPUAllocator: can't allocate memory", "could not create a primitive"),
        *("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory"),  # cuBLAS's workspace, pinned memory
        *("CUBLAS_STATUS_NOT_INITIALIZED", "Triton Error [CUDA]: out of memory"),  # cuBLAS's handle, a kernel's code
        "CUDA out of memory",  # in a region while it is compiled: the error is the compiler's
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(message in str(error) for message in messages)


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
