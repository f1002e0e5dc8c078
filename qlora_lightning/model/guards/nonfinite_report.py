"""Writes what is known of a step that was not finite into a file of the run folder, and words it in a sentence."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_lightning.model.batch.rows import describe_row, join_places, row_places
from qlora_lightning.model.guards.nonfinite import Finding
from qlora_lightning.safe_file import write_whole


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
