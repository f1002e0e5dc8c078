"""Where a NaN or an infinity comes from, found and written down."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.batch import cut_into_rows, describe_row, join_places, row_places
from qlora_lightning.model.checkpoint.ranks import capture_generators, restore_generators
from qlora_lightning.model.guards.checks import frozen_tensors
from qlora_lightning.model.layers.fusing import choose_layers
from qlora_lightning.model.loss import LossSums
from qlora_lightning.model.window import Window
from qlora_lightning.support.files import write_whole

ComputeLoss = Callable[[Any], LossSums]


@dataclass
class Finding:
    """What running a window again has shown on one rank, in plain values.

    Attributes:
        rank: Of the process.
        window_rows: Places of all rows of its window.
        micro_batch: Number in the window, from 0, of the micro-batch that gave it; ``None`` if each came out finite.
        module: The first module whose output was not finite; ``None`` if each forward was.
        base_weight: A frozen weight of that module, or of any if there is none, which is not finite itself.
        gradients: The trainable tensors whose gradient is not finite.
        adapter_tensors: The trainable tensors that are not finite themselves.
        rows: The rows that give it alone, each a batch of its own; all of the micro-batch if none does.
        error: What ended the search.
    """

    rank: int
    window_rows: list[str]
    micro_batch: int | None = None
    module: str | None = None
    base_weight: str | None = None
    gradients: list[str] = field(default_factory=list)
    adapter_tensors: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


def find_nonfinite(model: nn.Module, compute_loss: ComputeLoss, window: Window, data: Any, rank: int = 0) -> Finding:
    """Run the micro-batches of a window again, one by one, until one gives a NaN or an infinity.

    Gradients and random generators stay as they were. Dropout is drawn again, so that what it alone caused may be gone.
    It never fails: the step is decided, and other ranks wait. Places and text of rows come from ``data``, the Trainer's
    data module, if there is one.
    """
    finding = Finding(rank, row_places(data, window.row_ids))
    generators = capture_generators()
    try:
        _search(finding, model, compute_loss, window, data)
    except Exception as error:
        finding.error = f"{type(error).__name__}: {error}"
    finally:
        restore_generators(generators)
    return finding


def _search(finding: Finding, model: nn.Module, compute_loss: ComputeLoss, window: Window, data: Any) -> None:
    trainable = trainable_tensors(model)
    finding.adapter_tensors = _nonfinite(trainable)
    for number, batch in enumerate(window.batches):
        loss_is_finite, modules, gradients = _run(model, compute_loss, batch)
        if loss_is_finite and not modules and not gradients:
            continue
        rows = cut_into_rows(batch)
        bad = [row for row in rows if _run(model, compute_loss, row) != (True, [], [])]
        finding.micro_batch, finding.gradients = number, gradients
        finding.module = modules[0] if modules else None
        finding.base_weight = _bad_base_weight(model, finding.module)
        finding.rows = [describe_row(data, row) for row in bad or rows]
        return
    finding.gradients = _nonfinite({name: p.grad for name, p in trainable.items() if p.grad is not None})


def _run(model: nn.Module, compute_loss: ComputeLoss, batch: Any) -> tuple[bool, list[str], list[str]]:
    """Run a micro-batch forward and backward.

    Returns:
        Whether its loss is finite, and the names of modules whose output and of tensors whose gradient is not.
    """
    # Watched to the end: layers with hooks are not fused, and checkpointed ones must run alike in backward.
    with torch.enable_grad(), _watching_outputs(model) as modules:
        loss = compute_loss(batch).nll_sum
        modules = list(modules)  # backward runs checkpointed layers again
        trainable = trainable_tensors(model)
        # Not backward(): `.grad`, and what DDP hangs on it, must not notice.
        made = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True) if loss.requires_grad else ()
    gradients = {name: gradient for name, gradient in zip(trainable, made, strict=False) if gradient is not None}
    return _is_finite(loss), modules, _nonfinite(gradients)


@contextmanager
def _watching_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Note each module that gives something not finite, the innermost first."""
    found: list[str] = []

    def hook_of(name: str) -> Any:
        return lambda module, inputs, output: None if _is_finite(output) else found.append(name)

    handles = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules() if name]
    choose_layers(model)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        choose_layers(model)


def _bad_base_weight(model: nn.Module, name: str | None) -> str | None:
    """Name a frozen tensor that is not finite: of a module, or of the model if none has shown itself.

    A head, which the loss applies in pieces, is called by no module.
    """
    for key, tensor in frozen_tensors(model.get_submodule(name or "")):
        if not _is_finite(tensor):
            return f"{name}.{key}" if name else key
    return None


def _is_finite(output: Any) -> bool:
    """Whether all tensors in the output of a module are; transformers' outputs are mappings."""
    if isinstance(output, Tensor):
        return bool(output.isfinite().all())
    inner = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return all(map(_is_finite, inner))


def _nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not _is_finite(tensor)]


def write_report(file: Path, step: int, what: str, findings: Iterable[Finding]) -> None:
    """Write down what was found on each rank, and that ``what`` of an optimizer step (from 0) is not finite."""
    content = {"step": step, "what": what, "ranks": [asdict(finding) for finding in findings]}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def describe_findings(findings: Sequence[Finding]) -> str:
    """Describe in a sentence where it comes from, over all ranks, and what to do about it if the run stops."""
    found = [finding for finding in findings if finding.micro_batch is not None]
    first = (found or findings)[0]
    if first.base_weight:
        return (
            f"It comes from the base's frozen weight {first.base_weight}, which is not finite itself: is the file of "
            "model.base damaged, do its weights exceed model.compute_dtype, or does a callback write to them?"
        )
    places = [row["place"] for each in found for row in each.rows] or [p for each in findings for p in each.window_rows]
    facts = [f"first module: {first.module or 'none, all outputs are finite'}"]
    if first.gradients:
        facts.append(f"gradients: {len(first.gradients)} tensors, as {first.gradients[-1]}")
    if first.adapter_tensors:
        facts.append(f"adapter tensors: {len(first.adapter_tensors)}, as {first.adapter_tensors[0]}")
    again = "Run again" if found else "Run again, each micro-batch is finite"
    return (
        f"{again}; {'; '.join(facts)}; rows: {join_places(places)}. Look at these rows, lower model.learning_rate, or "
        "set model.on_nonfinite: skip to leave such steps out."
    )
