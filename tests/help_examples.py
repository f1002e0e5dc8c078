"""The examples that a command's help shows, to run each as it is."""

import contextlib
import io
import shlex

from qlora_lightning.cli import main


def help_examples(command):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, "--help"])
    lines = [line.strip() for line in out.getvalue().splitlines()]
    found = [shlex.split(line)[1:] for line in lines if line.startswith(f"qlora-lightning {command} --")]
    assert found
    return found
