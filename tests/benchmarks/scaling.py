"""Whether cost grows linearly: batches of more and more short rows, and one longer and longer row."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.benchmarks.children import run_child

TOKENS = (1024, 2048, 4096, 8192, 16_384)
_SHORT_ROW = 200  # tokens


def measure_scaling(
    base: str, accelerator: str, threads: int, dtype: str, say: Callable[[str], None], tokens: Sequence[int] = TOKENS
) -> Iterator[dict[str, Any]]:
    """Time the quicker of two steps for each size in a process of its own, with gradient checkpointing.

    Args:
        base: as in ``model.base``.
        accelerator: ``cpu`` or ``gpu``.
        threads: of each process.
        dtype: of the products.
        say: told of each size when it is done.
        tokens: of the batches.

    Yields:
        Of each size ``tokens``, ``rows`` (``short`` or ``long``), ``tokens_per_second``, and ``bytes_per_token``: the
        memory that the steps needed beyond what was there before them.
    """
    for rows in ("short", "long"):
        for size in tokens:
            row_tokens = min(_SHORT_ROW, size) if rows == "short" else size
            options = [f"--tokens={size}", f"--row-tokens={row_tokens}", "--steps=2", f"--accelerator={accelerator}"]
            options.append(f"--dtype={dtype}")
            figures = run_child(sys.executable, "one_batch", [base, *options, "--gradient-checkpointing"], threads)
            line = {
                "rows": rows,
                "tokens": size,
                "tokens_per_second": figures["tokens_per_second"],
                "bytes_per_token": figures["step_private_bytes"] / size,
            }
            laid = "short rows" if rows == "short" else "one row"
            say(f"{size:,} tokens in {laid}: {line['tokens_per_second']:.1f} tokens/s")
            yield line
