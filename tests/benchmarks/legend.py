"""What the table's words mean."""

from tests.benchmarks.table import name_8b


def explain(repeats: int, accelerator: str, dtype: str, scaling: bool, llama_8b: int | None) -> list[str]:
    """Give the legend, a line for each kind of row.

    Args:
        repeats: of every run.
        accelerator: ``cpu`` or ``gpu``.
        dtype: of the products.
        scaling: whether there are rows of it.
        llama_8b: layers of the 8B-shaped base, if there are rows of one.
    """
    memory = (
        "the most that was allocated on the card until training ended"
        if accelerator == "gpu"
        else "the most resident memory of the whole process until training ended, imports and loading included"
    )
    lines = [
        f"Each figure is the median of {repeats} run{'s' if repeats > 1 else ''}, each in a process of its own, "
        "the sides in turns; ratio: ours over the peer's. checkpointed: with gradient checkpointing on both sides.",
        "tokens/s: real tokens over the seconds of the training loop; padding, imports, loading and tokenizing are not "
        "counted.",
        f"memory: {memory}; 1 GB is 10⁹ bytes.",
        f"ceiling: the matrix products of the same steps and nothing else, by torch in {dtype} in the same process, "
        "each as often as it occurs: base linears forward and their input gradients, products with A and B and their "
        "gradients, attention in tiles of 64 queries, the head on labelled tokens. Nothing below the lowest "
        "adapter has a gradient. Nothing that is computed again counts; only in the checkpointed row the products of "
        "the second forward pass do, up to the last of each layer, which backward does not need. Its share is of a "
        "second epoch, each step beside its own ceiling: in the first the system hands over fresh memory.",
        "validation: a pass over the same rows; its ceiling holds the forward products.",
        "second start: from the start of the process to the begin of the first step, all caches being filled; the "
        "process begins with all imports.",
    ]
    if accelerator == "cpu":
        lines.append(
            "busy loops: as many processes that do nothing but compute as ours has threads, on the same cores; "
            "half of the idle speed is what the system can share out."
        )
    if scaling:
        lines.append(
            "scaling: the better of two steps with gradient checkpointing on one random batch, a process for each "
            "size; short rows have 200 tokens; memory per token is what the steps needed beyond what was there before."
        )
    if llama_8b is not None:
        lines.append(
            f"{name_8b(llama_8b)}: random weights in Llama-3.1-8B's shape, steps of 512 tokens (two rows, half of them "
            "labelled) with gradient checkpointing; memory is that of the first two; the speed is of the middle one of "
            "three more, by share, each beside its ceiling. Private memory is RssAnon; the base, and libraries, lie in "
            "memory as mapped files (RssFile). The start is a second one too: the system has read those files before."
        )
    if accelerator == "gpu":
        lines.append(
            "peer: TRL with Liger's kernels. On a card the seconds begin behind the first step, in which both sides "
            "compile kernels."
        )
        return lines
    lines.append(
        "Goals were set for SmolLM2-135M in NF4 with double quantization, rank 8 on all linears, batches of 8 Alpaca "
        "rows, on 2 CPU cores."
    )
    return lines
