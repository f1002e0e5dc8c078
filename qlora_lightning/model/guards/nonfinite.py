"""Finds where a NaN or an infinity comes from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.checkpoint.ranks import capture_generators, restore_generators
from qlora_lightning.model.step.batch import cut_into_rows, describe_row, join_places, row_places
from qlora_lightning.model.step.loss import LossSums
from qlora_lightning.model.step.window import Window

ComputeLoss = Callable[[Any], LossSums]


Finding = dict[str, Any]
"""What running a window again has shown on one rank, in plain values.

``rank``; ``window_rows``, places of all rows of its window; ``micro_batch``, the number in the window of the one that
gave it, None if each came out finite; ``module``, the first whose output was not finite, None if each was; ``rows``,
those that give it alone, or all of the micro-batch if none does; ``error``, what ended the search.
"""


def find_nonfinite(
    model: nn.Module, compute_loss: ComputeLoss, window: Window, data: Any, rank: int = 0, is_sharded: bool = False
) -> Finding:
    """Run the micro-batches of a window again, one by one, until one gives a NaN or an infinity.

    Gradients and random generators stay as they were. Dropout is drawn again, so that what it alone caused may be gone.
    It never fails: the step is decided, and other ranks wait. Places and text of rows come from ``data``, the Trainer's
    data module, if there is one. With a sharded base each pass is one of all ranks: nothing is run
    again.
    """

    def run(batch: Any) -> tuple[bool, str | None]:
        return _run(model, compute_loss, batch)

    finding: Finding = {"rank": rank, "window_rows": row_places(data, window.row_ids), "rows": []}
    finding |= dict.fromkeys(("micro_batch", "module", "error"))
    generators = capture_generators()
    try:
        for number, batch in enumerate([] if is_sharded else window.batches):
            is_finite, finding["module"] = run(batch)
            if not is_finite:
                rows = cut_into_rows(batch)
                bad = [row for row in rows if not run(row)[0]]
                finding |= {"micro_batch": number, "rows": [describe_row(data, row) for row in bad or rows]}
                break
    except Exception as error:
        finding["error"] = f"{type(error).__name__}: {error}"
    finally:
        restore_generators(generators)
    return finding


def _run(model: nn.Module, compute_loss: ComputeLoss, batch: Any) -> tuple[bool, str | None]:
    """Run forward and backward; return whether all was finite, and the first module whose output was not."""
    # Watched to the end: layers with hooks are not fused, and checkpointed ones must run alike in backward.
    with torch.enable_grad(), _watching_outputs(model) as modules:
        loss = compute_loss(batch).nll_sum
        first = next(iter(modules), None)  # backward runs checkpointed layers again
        # Not backward(): `.grad`, and what DDP hangs on it, must not notice.
        trainable = list(trainable_tensors(model).values())
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True) if loss.requires_grad else ()
    return first is None and _is_finite([loss, *gradients]), first


@contextmanager
def _watching_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Note each module that gives something not finite, the innermost first."""
    found: list[str] = []

    def hook_of(name: str) -> Any:
        return lambda module, inputs, output: None if _is_finite(output) else found.append(name)

    handles = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(output: Any) -> bool:
    """Whether all tensors in the output of a module are; transformers' outputs are mappings."""
    if isinstance(output, Tensor):
        return bool(output.isfinite().all())
    inner = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return all(map(_is_finite, inner))


def describe_findings(findings: Sequence[Finding]) -> str:
    """Describe in a sentence where it comes from, over all ranks, and what to do about it if the run stops."""
    found = [finding for finding in findings if finding["micro_batch"] is not None]
    if found:
        module = next((each["module"] for each in found if each["module"]), "none, all outputs are finite")
        again, places = f"First module: {module}", [row["place"] for each in found for row in each["rows"]]
    else:
        failed = next((each["error"] for each in findings if each["error"]), None)
        again, places = f"Run again, {failed or 'each micro-batch is finite'}", []
    places = places or [place for each in findings for place in each["window_rows"]]
    return (
        f"{again}; rows: {join_places(places)}. Look at these rows, lower model.learning_rate, or set "
        "model.on_nonfinite: skip to leave such steps out."
    )
