"""Run by each process of a launch: several commands one after another, so that starting is paid for once.

Usage: run_commands.py FILE, a JSON list of argument lists.
"""

import json
import sys
from pathlib import Path

from qlora_lightning.cli import main

if __name__ == "__main__":
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        print(f"\ncode {main(argv)}: {argv[-1]}", flush=True)
