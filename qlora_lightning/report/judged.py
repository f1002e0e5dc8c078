"""What an ``evaluation.json`` says: on which rows, of which adapters, by which scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_lightning.evaluation.names import describe_answered
from qlora_lightning.report.run import Run

BASE, ADAPTER = "base", "adapter"
_DIFFERENCES = ("difference", "differences")
_NO_SCORES = ("loss", "perplexity", "token_accuracy", "stop_rate", "answer_tokens")


def metrics_of(run: Run) -> dict[str, Mapping[str, Any]]:
    """Give each metric's figures, by side."""
    found: Mapping[str, Any] = run.evaluation.get("metrics") or {}
    return {name: sides for name, sides in found.items() if isinstance(sides, Mapping)}


def is_of_test(run: Run) -> bool:
    """Whether the test rows were judged, and not the validation rows."""
    return run.evaluation.get("split") == "test"


def is_of_fit(run: Run) -> bool:
    """Whether the run's own fit judged, all its validation rows, and not `evaluate` later on whichever rows."""
    return not is_of_test(run) and not isinstance(run.evaluation.get("adapters"), Mapping)


def is_of_run(run: Run) -> bool:
    """Whether the run's own adapter is among those that were judged, so that figures are the run's."""
    folders = run.evaluation.get("adapters")
    return not isinstance(folders, Mapping) or any(_is_own(run, folder) for folder in folders.values())


def describe_rows(run: Run) -> str:
    """Say which rows were judged, and how many."""
    rows, answered = run.evaluation.get("rows"), run.evaluation.get("answered_rows")
    split = "test" if is_of_test(run) else "validation"
    if not isinstance(rows, int):
        return f"{split} rows"
    some = describe_answered(answered, rows) if isinstance(answered, int) else ""
    return f"{rows:,} {split} rows{some}"


def score_names(run: Run) -> list[str]:
    """Name the scores of answers that were measured, the one that counts most first."""
    metrics = metrics_of(run)
    first = [name for name in run.evaluation.get("scores") or [] if name in metrics]
    return list(dict.fromkeys([*first, *(name for name in metrics if name not in _NO_SCORES)]))


def adapter_names(run: Run) -> list[str]:
    """Name the adapters that were judged, as the user called them."""
    names = [side for sides in metrics_of(run).values() for side in sides if side not in (BASE, *_DIFFERENCES)]
    return list(dict.fromkeys(names)) or [ADAPTER]


def main_adapter(run: Run) -> str:
    """Name the adapter that stands for the run: its own, where that is among those that were judged, else the first."""
    names, folders = adapter_names(run), run.evaluation.get("adapters")
    for name, folder in folders.items() if isinstance(folders, Mapping) else ():
        if name in names and _is_own(run, folder):
            return str(name)
    return names[0]


def _is_own(run: Run, folder: Any) -> bool:
    """Whether a folder, relative perhaps to where `evaluate` was started, is that of the run's own adapter."""
    own, named = (run.folder / "adapter").resolve(), Path(str(folder))
    as_named = not named.is_absolute() and named.parts and own.parts[-len(named.parts) :] == named.parts
    return bool(as_named) or named.resolve() == own


def judged(run: Run, metric: str, side: str) -> float | None:
    """Give a metric of ``base``, or of the ``adapter`` that stands for the run, whatever the user called it."""
    found = metrics_of(run).get(metric, {}).get(main_adapter(run) if side == ADAPTER else side)
    value = found.get("value") if isinstance(found, Mapping) else found
    return float(value) if isinstance(value, int | float) else None
