"""Where a NaN or an infinity comes from, found and written down."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.batch import cut_into_rows, describe_row, join_places, row_places
from qlora_lightning.model.checkpoint.ranks import capture_generators, restore_generators
from qlora_lightning.model.guards.checks import int8_scales
from qlora_lightning.model.layers.fusing import choose_layers
from qlora_lightning.model.loss import LossSums
from qlora_lightning.support.files import write_whole

ComputeLoss = Callable[[Any], LossSums]


@dataclass
class Finding:
    """What running a window again has shown on one rank.

    Attributes:
        batch: Number of the micro-batch in its window, from 0; ``None`` where each came out finite.
        loss: Its summed loss.
        module: The first module whose output was not finite; ``None`` where each forward was.
        base_weight: A frozen weight of that module, or of any where there is none, which is not finite itself.
        gradients: The trainable tensors whose gradient is not finite, in the order of the forward pass.
        adapters: The trainable tensors that are not finite themselves.
        rows: The rows that give it alone, each a batch of its own; all of the micro-batch where none does.
        alone: Whether these rows were found to give it alone.
    """

    batch: int | None = None
    loss: float | None = None
    module: str | None = None
    base_weight: str | None = None
    gradients: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    alone: bool = False


def find_nonfinite(
    model: nn.Module, compute_loss: ComputeLoss, batches: Sequence[Any], losses: Sequence[Tensor]
) -> Finding:
    """Run the micro-batches of a window again, one by one, until one gives a NaN or an infinity.

    Gradients and random generators stay as they were. Dropout is drawn anew, so that what it alone caused may be gone.

    Args:
        model: What computes; modules are named below it.
        compute_loss: As :meth:`QLoRAModule.compute_loss`.
        batches: The window's micro-batches.
        losses: What each of them gave: those that were not finite come first.
    """
    finding = Finding(adapters=_nonfinite(trainable_tensors(model)))
    order = sorted(range(len(batches)), key=lambda number: bool(losses[number].isfinite()))
    generators = capture_generators()
    try:
        for number in order:
            loss, module, gradients = _examine(model, compute_loss, batches[number])
            if module or gradients or not torch.tensor(loss).isfinite():
                rows = cut_into_rows(batches[number])
                bad = [row for row in rows if _is_bad(model, compute_loss, row)]
                finding.batch, finding.loss, finding.module, finding.gradients = number, loss, module, gradients
                finding.rows, finding.alone = bad or rows, bool(bad)
                finding.base_weight = _bad_base_weight(model, module)
                return finding
    finally:
        restore_generators(generators)
    finding.gradients = _nonfinite({n: p.grad for n, p in trainable_tensors(model).items() if p.grad is not None})
    return finding


def _is_bad(model: nn.Module, compute_loss: ComputeLoss, row: Any) -> bool:
    loss, module, gradients = _examine(model, compute_loss, row)
    return bool(module or gradients) or not torch.tensor(loss).isfinite()


def _examine(model: nn.Module, compute_loss: ComputeLoss, batch: Any) -> tuple[float, str | None, list[str]]:
    """Run a micro-batch forward and backward; gives its loss, the first bad module, and bad gradients by name."""
    # Watched to the end: layers with hooks are not fused, and checkpointed ones must run alike in backward.
    with torch.enable_grad(), _watching_outputs(model) as found:
        loss = compute_loss(batch).nll_sum
        first = found[0] if found else None
        trainable = trainable_tensors(model)
        # Not backward(): `.grad`, and what DDP hangs on it, must not notice.
        made = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True) if loss.requires_grad else ()
    gradients = {name: gradient for name, gradient in zip(trainable, made, strict=False) if gradient is not None}
    return float(loss.detach()), first, _nonfinite(gradients)


@contextmanager
def _watching_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Note each module that gives something not finite, the innermost first."""
    found: list[str] = []

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(bool(tensor.isfinite().all()) for tensor in _floats(output)):
                found.append(name or type(module).__name__)

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules()]
    choose_layers(model)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        choose_layers(model)


def _bad_base_weight(model: nn.Module, name: str | None) -> str | None:
    """Name a frozen weight that is not finite: of a module, or of the model where none has shown itself.

    A head, which the loss applies in pieces, is called by no module.
    """
    name = name if name and name in dict(model.named_modules()) else ""
    for key, module in model.get_submodule(name).named_modules(prefix=name):
        for own, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad and not _dense(parameter, module).isfinite().all():
                return f"{key}.{own}".removeprefix(".")
    return None


def _dense(weight: nn.Parameter, module: nn.Module) -> Tensor:
    """What tells whether a weight is finite: itself, made dense from 4 bits, or the scales of int8."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        dense: Tensor = bnb.functional.dequantize_4bit(weight.data, state)
        return dense
    scales = int8_scales(module)
    return weight.detach() if scales is None else scales


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):  # transformers' outputs are, too
        for value in output.values():
            yield from _floats(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floats(value)


def _nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def describe_finding(finding: Finding, data: Any, row_ids: Sequence[int], rank: int = 0) -> dict[str, Any]:
    """Describe one rank's finding in plain values.

    Args:
        finding: What running the window again has shown.
        data: The Trainer's data module, or ``None``: it knows places and text.
        row_ids: Of all rows of the window on this rank.
        rank: Of this process.
    """
    loss = finding.loss
    return {
        "rank": rank,
        "found": finding.batch is not None,
        "micro_batch": finding.batch,
        "loss": None if loss is None else loss if math.isfinite(loss) else str(loss),  # JSON knows no NaN
        "first_module": finding.module,
        "base_weight": finding.base_weight,
        "gradients": finding.gradients,
        "adapter_tensors": finding.adapters,
        "rows": [describe_row(data, row) for row in finding.rows],
        "rows_give_it_alone": finding.alone,
        "rows_of_the_window": row_places(data, row_ids),
    }


def report_file(folder: str | Path, step: int) -> Path:
    """Say where the report of an optimizer step (from 0) lies in a run folder."""
    return Path(folder) / f"nonfinite-step-{step}.json"


def write_report(file: Path, step: int, what: str, ranks: Sequence[dict[str, Any]]) -> None:
    """Write the report, beside and renamed.

    Args:
        file: Where to.
        step: Optimizer step, from 0.
        what: What is not finite.
        ranks: Of each rank, what :func:`describe_finding` gave.
    """
    content = {"step": step, "what": what, "ranks": list(ranks)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def word_findings(ranks: Sequence[dict[str, Any]]) -> str:
    """Say in a sentence where it comes from, over all ranks."""
    found = [rank for rank in ranks if rank["found"]]
    if not found:
        places = [place for rank in ranks for place in rank["rows_of_the_window"]]
        bad = ranks[0]["gradients"]
        tensors = f"; the gradient of {len(bad)} tensors is not, as {bad[0]}" if bad else ""
        return f"Run again, each micro-batch is finite{tensors}. The step's rows: {join_places(places)}."
    first = found[0]
    if first["base_weight"]:
        return f"It comes from the base's frozen weight {first['base_weight']}, which is not finite itself."
    places = [row["place"] for rank in found for row in rank["rows"]]
    source = (
        f"first from {first['first_module']}"
        if first["first_module"]
        else f"in the gradient of {len(first['gradients'])} tensors, as {first['gradients'][-1]}, all modules' outputs "
        "being finite"
        if first["gradients"] and not isinstance(first["loss"], str)  # a loss that is not finite spoils them all
        else "in compute_loss, all modules' outputs being finite"
    )
    spoilt = f" Adapter tensors are not finite themselves, as {_first(found)}." if _first(found) else ""
    return f"It comes {source}; rows: {join_places(places)}.{spoilt}"


def word_remedy(ranks: Sequence[dict[str, Any]]) -> str:
    """Say what to do about it, after the run was stopped."""
    if any(rank["base_weight"] for rank in ranks):
        return (
            "No row is at fault, nor a setting of the training: is the file of model.base damaged, do its weights "
            "exceed model.compute_dtype, or does a callback write to them?"
        )
    return (
        "The run stops before the adapters are spoilt: look at these rows, lower model.learning_rate, "
        "or set model.on_nonfinite: skip to leave such steps out."
    )


def _first(ranks: Sequence[dict[str, Any]]) -> str | None:
    return next((name for rank in ranks for name in rank["adapter_tensors"]), None)
