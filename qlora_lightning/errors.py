"""The one exception that means: what the user gave us cannot work, and this sentence says why."""


class UserError(ValueError):
    """A mistake in what the user gave: a config value, a file, a checkpoint.

    The message is one clear sentence or two: what was expected, what was found (file and line, key, value) and what
    to do. The command line prints it without a traceback and exits with code 2.
    """
