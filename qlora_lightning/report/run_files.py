"""A run folder as data: its manifest, its table of metrics, and the other files that a report reads."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qlora_lightning.evaluation.intervals import MOST, Interval, read_interval
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import EVALUATION, MANIFEST, METRICS, check_keys, read_json_object, write_whole

_FORMAT, _VERSION = "qlora_lightning manifest", 1  # a reader of version N reads every file up to N
_REMEDY = "Correct it, move it away, or update qlora_lightning."
_NUMBER, _TEXT, _OBJECT = float | None, str | None, dict[str, object] | None
_ATTEMPT = {"started": str, "status": str, **dict.fromkeys(("from_step", "to_step", "seconds"), float)}
_SPLITS: dict[str, Any] = {"train": {"rows": _NUMBER}, "val": _OBJECT}
_OBJECTS: dict[str, Any] = {
    "config": dict.fromkeys(("model", "data"), _OBJECT),
    "parameters": dict.fromkeys(("trainable", "all"), _NUMBER),
    "data": {"files": _OBJECT, "splits": _SPLITS, "hashes": {"train": _TEXT, "val": _TEXT}, "settings": _OBJECT},
    "progress": dict.fromkeys(("steps", "planned_steps", "tokens", "labelled_tokens", "rows", "seconds"), _NUMBER),
    "best": {"value": _NUMBER},
    **dict.fromkeys(("base", "adapter", "device", "packages"), _OBJECT),
}
_MANIFEST = {
    **{"format": Literal["qlora_lightning manifest"], "format_version": range(1, _VERSION + 1)},
    **{"status": _TEXT, "reproduce": _TEXT, "attempts": list[dict[str, object]] | None, **_OBJECTS},
}
_EVALUATION = {
    **{"rows": _NUMBER, "answered_rows": _NUMBER, "samples": list[dict[str, str]] | None},
    "metrics": dict[str, dict[str, dict[str, Real | None]]] | None,
}
Points = list[tuple[float, float]]
"""(optimizer steps done, value), in the order of the file."""


class MeasuredSides(NamedTuple):
    """One metric of both sides; NaN is unknown."""

    base: Interval
    adapter: Interval
    difference: Interval


@dataclass(frozen=True)
class Run:
    """What a run folder holds; what it lacks is empty."""

    folder: Path  # as the user typed it
    name: str  # distinguishes the run from the others of a report
    status: str  # finished, stopped (by a signal), failed, running (or killed: nothing wrote its end)
    manifest: Mapping[str, Any] = field(default_factory=dict)  # with all its objects, if empty
    config: Mapping[str, Any] = field(default_factory=dict)  # of the manifest
    metrics: Mapping[str, Points] = field(default_factory=dict)  # the columns of metrics.csv
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # as the fit wrote it, not `evaluate`

    @property
    def comparison(self) -> dict[str, MeasuredSides]:
        """The metrics of the evaluation, by name."""
        return {
            name: MeasuredSides(*(read_interval(sides.get(side, {})) for side in MeasuredSides._fields))
            for name, sides in (self.evaluation.get("metrics") or {}).items()
        }


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run folder, also of a run that is still training.

    Raises:
        UserError: It holds no run, or a newer version of this package wrote it.
    """
    manifest = read_manifest(folder)
    if not manifest:
        raise UserError(
            f"{folder} holds no run: expected {MANIFEST} in it. Name the folder that "
            "trainer.default_root_dir of its fit was.",
            "run_folder.empty",
        )
    manifest |= {key: manifest.get(key) or {} for key in _OBJECTS}
    file = folder / EVALUATION
    evaluation = read_json_object(file, _REMEDY) if file.is_file() else {}
    evaluation = {} if "adapters" in evaluation else evaluation
    check_keys(evaluation, _EVALUATION, str(file), _REMEDY)
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        status=manifest.get("status") or "running",
        manifest=manifest,
        config=manifest["config"],
        metrics=read_metrics(folder / METRICS),
        evaluation=evaluation,
    )


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``manifest.json``, under its format and version."""
    write_whole(folder / MANIFEST, {"format": _FORMAT, "format_version": _VERSION, **content})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a run folder; empty if there is none."""
    file = folder / MANIFEST
    if not file.is_file():
        return {}
    content = read_json_object(file, _REMEDY)
    check_keys(content, _MANIFEST, str(file), _REMEDY)
    for attempt in content.get("attempts") or []:
        check_keys(attempt, _ATTEMPT, f"{file}: attempts", _REMEDY)
    return content


def read_metrics(file: Path) -> dict[str, Points]:
    """Read each column of ``metrics.csv`` as points; empty cells, NaN and beyond 1e100 are left out."""
    columns: dict[str, Points] = {}
    for row in read_metric_rows(file):
        step = float(row.pop("step")) + 1  # Lightning counts steps from 0
        for name, cell in row.items():
            value, points = float(cell or "nan"), columns.setdefault(name, [])
            if abs(value) < MOST:
                points.append((step, value))
    return columns


def read_metric_rows(file: Path) -> list[dict[str, str]]:
    """Read the lines of ``metrics.csv``, also with the byte-order mark and the semicolons of a spreadsheet.

    An incomplete last line, of a killed or running fit, is left out. A missing file has no lines.

    Raises:
        UserError: It is no table of numbers by step.
    """
    if not file.is_file():  # reading a pipe would block
        return []
    try:
        lines, _, _ = file.read_text(encoding="utf-8-sig").rpartition("\n")
        delimiter = ";" if lines.startswith("step;") else ","
        rows = list(csv.DictReader(lines.splitlines(), delimiter=delimiter, restval=""))
        for row in rows:
            row["step"] = str(int(float(row["step"])))  # a spreadsheet may write 0.0
            for cell in row.values():
                float(cell or "nan")
    except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise UserError(
            f"{file} is no table of numbers by step, as a fit writes it ({error}). Move it away.", METRICS
        ) from error
    return rows
