"""A run folder as data: its manifest, its table of metrics, and the other files that a report reads."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import load_yaml, lock_folder, read_json_object, write_whole

MANIFEST = "manifest.json"
FORMAT = "qlora_lightning manifest"
VERSION = 1  # a reader of version N reads every file up to N
READ = (MANIFEST, "metrics.csv", "config.yaml", "evaluation.json", "plan.json", "adapter/qlora_lightning.json")
RUN_FILES = (MANIFEST, "metrics.csv")  # a folder with one of these is a run's
_REMEDY = "Move it away to make the report without it."
_LARGEST = 3.5e38  # just beyond what float32 holds
Points = list[tuple[float, float]]
"""(optimizer steps done, value), in the order of the file."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        folder: As the user typed it.
        name: Distinguishes the run from the others of a report.
        status: ``finished``, ``stopped`` (by a signal), ``failed``, ``running``, ``killed`` (nothing wrote how it
            ended), or ``unknown``: no manifest.
        manifest: Of ``manifest.json``; empty without one.
        config: Of the manifest, else of ``config.yaml``.
        metrics: Columns of ``metrics.csv``.
        evaluation: Of ``evaluation.json``.
        plan: Of ``plan.json``: memory predicted and measured.
        adapter: Of ``adapter/qlora_lightning.json``: base, quantization, fingerprint.
    """

    folder: Path
    name: str
    status: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Points] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run folder, also of a run that is still training.

    Raises:
        UserError: It holds no run, or a file of it is damaged.
    """
    _check_folder(folder)
    manifest = read_manifest(folder)
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        status=_read_status(folder, manifest),
        manifest=manifest or {},
        config=(manifest or {}).get("config") or _read_config(folder / "config.yaml"),
        metrics=read_metrics(folder / "metrics.csv"),
        evaluation=_read_json(folder / "evaluation.json"),
        plan=_read_json(folder / "plan.json"),
        adapter=_read_json(folder / "adapter" / "qlora_lightning.json"),
    )


def name_runs(folders: Sequence[Path]) -> list[str]:
    """Name each folder by the shortest end of its path that no other one has."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


@contextmanager
def reading(*runs: Run) -> Iterator[None]:
    """Report a damaged file of a run: one whose JSON has another form than ours."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        folders, files = " or ".join(str(run.folder) for run in runs), ", ".join(READ)
        raise UserError(
            f"A file of {folders} is damaged ({type(error).__name__}: {error}): one of {files}. {_REMEDY}"
        ) from error


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write ``manifest.json`` whole, under its format and version.

    Args:
        folder: The run folder.
        content: Plain values; NaN and infinities become null, which JSON knows.

    Raises:
        OSError: The disk is full or fails.
    """
    head = {"format": FORMAT, "format_version": VERSION}
    text = json.dumps(_finite({**head, **content}), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a run folder; ``None`` if there is none.

    Raises:
        UserError: It is damaged, of another kind, or a newer version wrote it.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    content = _read_json(file)
    if content.get("format") != FORMAT:
        raise UserError(f"{file} is not a manifest of qlora_lightning: expected format {FORMAT!r} in it.")
    version = content.get("format_version")
    if not isinstance(version, int) or version > VERSION:
        raise UserError(f"{file} has format_version {version}, this version reads up to {VERSION}: update.")
    return content


def read_metrics(file: Path) -> dict[str, Points]:
    """Read each column of ``metrics.csv`` as points; empty cells, NaN and infinities are left out.

    Half a line at the end, which a killed or running fit leaves, is left out too. A missing file has no columns.

    Raises:
        UserError: It cannot be read, or has no column ``step``.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # a spreadsheet writes a mark of its own before the first name
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    whole, _, _ = text.rpartition("\n")
    rows = csv.DictReader(whole.splitlines())
    if whole and "step" not in (rows.fieldnames or ()):
        raise UserError(f"{file} is not a table of metrics: expected a column `step` in its first line.")
    columns: dict[str, Points] = {name: [] for name in rows.fieldnames or () if name != "step"}
    for row in rows:
        step = _number(row["step"])
        for name, points in columns.items():
            value = _number(row[name])
            if step is not None and value is not None:
                points.append((step + 1, value))  # Lightning counts steps from 0
    return columns


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) <= _LARGEST else None  # which NaN is not


def _read_json(file: Path) -> dict[str, Any]:
    return read_json_object(file, _REMEDY) if file.exists() else {}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def _check_folder(folder: Path) -> None:
    if any((folder / mark).is_file() for mark in RUN_FILES):
        return
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: name the run folder (trainer.default_root_dir of its fit).")
    inner = sorted({found.parent for mark in RUN_FILES for found in folder.glob(f"*/{mark}")})
    hint = f" These folders in it do: {', '.join(map(str, inner[:6]))}." if inner else ""
    raise UserError(f"{folder} holds no run: expected {' or '.join(RUN_FILES)} in it, which `fit` writes.{hint}")


def _read_status(folder: Path, manifest: Mapping[str, Any] | None) -> str:
    written = "unknown" if manifest is None else str(manifest.get("status", "unknown"))
    if written in ("running", "unknown") and _is_training(folder):
        return "running"
    return "killed" if written == "running" else written


def _is_training(folder: Path) -> bool:
    """Whether a process holds the lock that ``fit`` takes on the folder of its checkpoints."""
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        return False
    try:
        descriptor = lock_folder(checkpoints, shared=True)
    except BlockingIOError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return False


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = load_yaml(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} is damaged: {' '.join(str(error).split())}. {_REMEDY}") from error
    return config if isinstance(config, dict) else {}
