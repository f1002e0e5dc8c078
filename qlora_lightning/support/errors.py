"""What ends a command early: a mistake in what the user gave us, or a signal that asked training to stop."""

import signal

# that of a closed terminal is not there on Windows
ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class UserError(ValueError):
    """A mistake in what the user gave: a config value, a file, a checkpoint.

    The message is one clear sentence or two: what was expected, what was found (file and line, key, value) and what
    to do. The command line prints it without a traceback and exits with code 2.
    """


class TrainingStopped(SystemExit):
    """A signal asked a command to stop, and what there was to save is saved: nothing failed.

    A ``SystemExit``, so that a script that trains ends with the code that a shell or a scheduler expects of the signal:
    130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """


class LostProcess(RuntimeError):
    """Another process of the run is gone: this one cannot go on. The command line exits with code 1."""
