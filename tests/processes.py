"""Python in a process of its own."""

import subprocess
import sys


def run_python(*arguments, **options):
    """Run Python, which must end well; give what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done
