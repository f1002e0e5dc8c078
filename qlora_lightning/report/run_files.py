"""A run folder as data: its manifest, its table of metrics, and the other files that a report reads."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import EVALUATION, MANIFEST, METRICS, read_json_object, write_whole

_FORMAT, _VERSION = "qlora_lightning manifest", 1  # a reader of version N reads every file up to N
Points = list[tuple[float, float]]
"""(optimizer steps done, value), in the order of the file."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds; what it lacks is empty."""

    folder: Path  # as the user typed it
    name: str  # distinguishes the run from the others of a report
    status: str  # finished, stopped (by a signal), failed, running (or killed: nothing wrote its end)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)  # of the manifest
    metrics: Mapping[str, Points] = field(default_factory=dict)  # the columns of metrics.csv
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # as the fit wrote it, not `evaluate`


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run folder, also of a run that is still training; a ``UserError`` names a damaged file."""
    manifest = read_manifest(folder)
    if not manifest:
        raise UserError(
            f"{folder} holds no run: expected {MANIFEST} in it. Name the folder that "
            "trainer.default_root_dir of its fit was."
        )
    evaluation = _read_json(folder / EVALUATION)
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        status=manifest["status"],
        manifest=manifest,
        config=manifest.get("config") or {},
        metrics=read_metrics(folder / METRICS),
        evaluation={} if "adapters" in evaluation else evaluation,
    )


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``manifest.json``, under its format and version."""
    write_whole(folder / MANIFEST, {"format": _FORMAT, "format_version": _VERSION, **content})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a run folder; empty if there is none."""
    content = _read_json(folder / MANIFEST)
    if content and (content.get("format") != _FORMAT or content.get("format_version", math.inf) > _VERSION):
        raise UserError(
            f"{folder / MANIFEST}: expected format {_FORMAT!r}, version {_VERSION} or earlier, found "
            f"{content.get('format')!r}, version {content.get('format_version')}. Update qlora_lightning."
        )
    return content


def read_metrics(file: Path) -> dict[str, Points]:
    """Read each column of ``metrics.csv`` as points; empty cells, NaN and infinities are left out.

    An incomplete last line, of a killed or running fit, is left out too. A missing file has no columns.
    """
    if not file.is_file():  # reading a pipe would block
        return {}
    lines, _, _ = file.read_text(encoding="utf-8-sig").rpartition("\n")  # a spreadsheet adds a byte-order mark
    rows = csv.DictReader(lines.splitlines())
    columns: dict[str, Points] = {name: [] for name in rows.fieldnames or () if name != "step"}
    for row in rows:
        for name, points in columns.items():
            value = float(row[name] or "nan")
            if math.isfinite(value):
                points.append((float(row["step"]) + 1, value))  # Lightning counts steps from 0
    return columns


def _read_json(file: Path) -> dict[str, Any]:
    return read_json_object(file, "Move it away to make the report without it.") if file.is_file() else {}
