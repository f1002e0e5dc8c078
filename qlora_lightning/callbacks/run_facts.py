"""What a run is and has come to, as plain values for its manifest."""

import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from qlora_lightning import __version__
from qlora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from qlora_lightning.callbacks.throughput import ThroughputMonitor
from qlora_lightning.model.adapters.identity import identity_of_data
from qlora_lightning.model.checkpoint.format import plain_settings
from qlora_lightning.model.checkpoint.setting_changes import trainer_settings
from qlora_lightning.model.device import device_memory_gib, read_peak_gib
from qlora_lightning.model.summary import count_parameters
from qlora_lightning.report.run import read_metrics
from qlora_lightning.support.trainer import callbacks_of

_PACKAGES = (
    *("qlora-lightning", "torch", "lightning", "transformers", "peft", "bitsandbytes", "tokenizers", "datasets"),
    *("accelerate", "safetensors", "torchmetrics", "numpy"),
)
_SECONDS = 5  # for git: a repository on a slow disk holds no run up


def fixed_facts(trainer: Trainer, pl_module: LightningModule, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Give what does not change while a run goes on.

    Args:
        trainer: Of a fit whose model and data are there.
        pl_module: What it trains.
        config: The run's config, whole; ``None``: what module, data and Trainer say of themselves.
    """
    module: Any = pl_module
    identity = {name: value for name, value in getattr(module, "identity", {}).items() if name != "data"}
    adapter = identity.pop("adapter", None)
    trainable, total = count_parameters(module)
    return {
        "written_by": f"qlora_lightning {__version__}",
        "base": identity,
        "adapter": adapter,
        "parameters": {"trainable": trainable, "all": total},
        "data": _data_facts(trainer),
        "config": dict(config) if config is not None else _own_settings(trainer, module),
        "seed": _seed(trainer),
        "device": _device_facts(trainer),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": git_state(Path.cwd()),
    }


def progress_facts(trainer: Trainer, ended: bool) -> dict[str, Any]:
    """Give how far a run has come, its peak of memory, and what was measured last and best.

    Args:
        trainer: Of the fit.
        ended: Whether to look up the peaks of the whole run, earlier lives included, in its table of metrics.
    """
    speed = _find(trainer, ThroughputMonitor)
    counted = speed is not None and speed.enabled
    saved = _find(trainer, AdapterCheckpoint)
    best = (
        {"monitor": saved.monitor, "value": saved.best[0][0], "checkpoint": saved.best[0][1]}
        if (saved and saved.best)
        else None
    )
    return {
        "progress": {
            "steps": trainer.global_step,
            "epoch": trainer.current_epoch,
            "tokens": speed.tokens_seen if counted else None,
            "labelled_tokens": speed.labelled_seen if counted else None,
        },
        "peak_memory_gib": _peaks(trainer, ended),
        "metrics": {name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
        "best": best,
    }


def find_early_stop(trainer: Trainer) -> str | None:
    """Give what Lightning's EarlyStopping says of why it ended this fit; ``None`` where it did not."""
    if not trainer.should_stop:  # what a checkpoint says of the run before does not count
        return None
    said = [each.stopping_reason_message for each in callbacks_of(trainer) if isinstance(each, EarlyStopping)]
    return next((words.removesuffix(" Signaling Trainer to stop.") for words in said if words), None)


def planned_steps(trainer: Trainer) -> int | None:
    """Give the optimizer steps of the whole run; ``None`` where only time ends it."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) and steps >= 0 else None


def _data_facts(trainer: Trainer) -> dict[str, Any]:
    data: Any = getattr(trainer, "datamodule", None)
    identity = identity_of_data(trainer)
    settings, _ = identity.pop("settings", {}), identity.pop("samples", {})
    files = {split: value for split, value in getattr(data, "files", {}).items() if value is not None}
    reports = getattr(data, "reports", {})
    return {
        "files": files,
        "splits": {split: report.as_dict() for split, report in reports.items()},
        "filters": {split: _filtered(report) for split, report in reports.items()},
        "hashes": identity,
        "settings": settings,
    }


def _filtered(report: Any) -> dict[str, int]:
    """Rows after each filter, and the samples made of those that are kept."""
    well_formed = report.rows - report.bad_rows
    kept = well_formed - sum(report.dropped.values())
    return {"read": report.rows, "well_formed": well_formed, "kept": kept, "samples": report.samples}


def _own_settings(trainer: Trainer, module: Any) -> dict[str, Any]:
    data: Any = getattr(trainer, "datamodule", None)
    settings = {**getattr(data, "files", {}), **identity_of_data(trainer).get("settings", {})}
    return {
        "model": plain_settings(getattr(module, "hparams", {})),
        "data": plain_settings(settings),
        "trainer": trainer_settings(trainer),
    }


def _seed(trainer: Trainer) -> int | None:
    """The seed that orders the rows, else that of ``seed_everything``."""
    data: Any = getattr(trainer, "datamodule", None)
    chosen = data.state_dict().get("seed") if data is not None else None
    asked = os.environ.get("PL_GLOBAL_SEED")
    return chosen if chosen is not None else int(asked) if asked else None


def _device_facts(trainer: Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    is_cuda = device.type == "cuda"
    return {
        "kind": device.type,
        "name": torch.cuda.get_device_name(device) if is_cuda else processor_name(),
        "memory_gib": device_memory_gib(device),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "nodes": trainer.num_nodes,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
    }


def _peaks(trainer: Trainer, ended: bool) -> dict[str, float]:
    """The highest of what was logged, and of this process as it is now."""
    device = trainer.strategy.root_device
    name = "memory_peak_gib" if device.type == "cuda" else "peak_rss_gib"  # the former is reset at each logging
    metrics = read_metrics(Path(trainer.default_root_dir) / "metrics.csv") if ended else {}
    logged = {
        column: max(y for _, y in points) for column, points in metrics.items() if column[-4:] == "_gib" and points
    }
    return {**logged, name: max(read_peak_gib(device), logged.get(name, 0.0))}


def _find(trainer: Trainer, kind: type[Any]) -> Any:
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


def package_versions() -> dict[str, str]:
    """Give the versions of the packages that decide what is computed, as far as they are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Give commit, branch, and whether tracked files were changed; ``None`` outside a repository or without git."""
    commit = _ask_git(folder, "rev-parse", "HEAD")
    changes = _ask_git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "branch": _ask_git(folder, "branch", "--show-current") or None, "dirty": bool(changes)}


def processor_name() -> str:
    """Name the processor as its maker does, where the system tells it."""
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        for line in cpus.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _ask_git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
