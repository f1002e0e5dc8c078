"""What ends a command early: a mistake in the user's input, or a signal that asked training to stop."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the user's input: a config value, a file, a checkpoint.

    The message is one clear sentence or two: what was expected, what was found (file and line, key, value) and what
    to do. The command line prints it without a traceback and exits with code 2.
    """


class Diverged(UserError):
    """A loss or gradient is NaN or infinite: the run ends, and earlier checkpoints stay."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` with the most similar known name, to end a message; empty if none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


class TrainingStopped(SystemExit):
    """A signal asked a command to stop, and everything is saved: nothing failed.

    A ``SystemExit``, so that a script that trains ends with the code that a shell or a scheduler expects of the signal:
    130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
