"""What an ``evaluation.json`` says: on which rows, of which adapters, by which scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    own = (run.folder / "adapter").resolve()
    for name, folder in folders.items() if isinstance(folders, Mapping) else ():
        if name in names and Path(str(folder)).resolve() == own:
            return str(name)
    return names[0]


def judged(run: Run, metric: str, side: str) -> float | None:
    """Give a metric of ``base``, or of the ``adapter`` that stands for the run, whatever the user called it."""
    found = metrics_of(run).get(metric, {}).get(main_adapter(run) if side == ADAPTER else side)
    value = found.get("value") if isinstance(found, Mapping) else found
    return float(value) if isinstance(value, int | float) else None
