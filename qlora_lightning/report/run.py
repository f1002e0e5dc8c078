"""Reads a run folder: whatever of it there is."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.report.manifest import NAME, read_json, read_manifest
from qlora_lightning.report.metrics import Points, read_metrics
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import load_yaml, lock_folder

READ = (NAME, "metrics.csv", "config.yaml", "evaluation.json", "plan.json", "adapter/qlora_lightning.json")
_MARKS = (NAME, "metrics.csv")  # a folder with one of these is a run's


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        folder: As it was named.
        name: What tells it from the other runs of a report.
        status: ``finished``, ``stopped`` (by a signal), ``failed``, ``running``, ``killed`` (it ended without a word),
            or ``unknown``: an earlier version wrote no manifest.
        manifest: Of ``manifest.json``; empty without one.
        config: Of the manifest, else of ``config.yaml``.
        metrics: Columns of ``metrics.csv``.
        evaluation: Of ``evaluation.json``, which `evaluate` writes.
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
    """Read a run folder; a run that is going on will do.

    Raises:
        UserError: It holds no run, or a file of it is damaged.
    """
    _check_folder(folder)
    manifest = read_manifest(folder)
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        status=_status(folder, manifest),
        manifest=manifest or {},
        config=(manifest or {}).get("config") or _read_config(folder / "config.yaml"),
        metrics=read_metrics(folder / "metrics.csv"),
        evaluation=read_json(folder / "evaluation.json") or {},
        plan=read_json(folder / "plan.json") or {},
        adapter=read_json(folder / "adapter" / "qlora_lightning.json") or {},
    )


def name_runs(folders: Sequence[Path]) -> list[str]:
    """Give each folder the shortest end of its path that no other one has."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts), default=0)
    for length in range(1, longest + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise UserError(f"There is no folder {folder}: name the run folder (trainer.default_root_dir of its fit).")
    if folder.is_file():
        raise UserError(f"{folder} is a file: name the run folder itself, such as {folder.parent}.")
    if any((folder / mark).is_file() for mark in _MARKS):
        return
    inner = sorted(found.parent for mark in _MARKS for found in folder.glob(f"*/{mark}"))
    hint = f" Runs lie in it: {', '.join(map(str, dict.fromkeys(inner[:6])))}." if inner else ""
    raise UserError(f"{folder} holds no run: expected {' or '.join(_MARKS)} in it, which `fit` writes.{hint}")


def _status(folder: Path, manifest: Mapping[str, Any] | None) -> str:
    written = "unknown" if manifest is None else str(manifest.get("status", "unknown"))
    if written in ("running", "unknown") and _is_going_on(folder):
        return "running"
    return "killed" if written == "running" else written


def _is_going_on(folder: Path) -> bool:
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
        config = load_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    return config if isinstance(config, dict) else {}
