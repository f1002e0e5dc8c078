"""Writes the record of a run into its folder: the manifest while it trains, the page when it ends."""

import importlib.metadata
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from qlora_lightning.callbacks.monitors import ThroughputMonitor
from qlora_lightning.callbacks.run_folder import is_resumed
from qlora_lightning.model.adapters.identity import identity_of_data
from qlora_lightning.model.adapters.inject import count_parameters
from qlora_lightning.model.load.machine import device_memory_gib
from qlora_lightning.model.memory.budget import RowDoesNotFit
from qlora_lightning.report import read_manifest, read_run, write_manifest, write_run_page
from qlora_lightning.report.assessment import assess
from qlora_lightning.report.page import next_steps
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import TrainingStopped, is_out_of_memory
from qlora_lightning.support.files import ADAPTER_FOLDER, CONFIG, IDENTITY, resolve_unnamed
from qlora_lightning.support.trainer import datamodule_of, find_callback, is_trial_run, planned_steps
from qlora_lightning.version import __version__

_PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "tokenizers", "datasets", "safetensors")


class RunReport(Callback):
    """Write ``manifest.json`` at the start, at each validation and at the end of a fit, and then ``report.html``.

    Also if a signal or an error ends the fit early. The manifest lists each attempt of a resumed run, and the sum of
    their seconds. Nothing of it enters a checkpoint.

    Args:
        config: The run's whole config, if it has one.
        command: The command line, as a list; ``None``: that of this process.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, command: Sequence[str] | None = None) -> None:
        self.config = config
        self.command = list(sys.orig_argv if command is None else command)
        self._facts: dict[str, Any] | None = None  # None: no run has begun, or it has ended

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._facts = None
        self._attempts: list[dict[str, Any]] = []  # the last one is this process's

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or is_trial_run(trainer):
            return
        manifest = read_manifest(Path(trainer.default_root_dir)) if is_resumed(trainer) else {}
        attempt = {"command": shlex.join(self.command), "from_step": trainer.global_step, "started": _now()}
        attempt["resumed_from"] = str(trainer.ckpt_path) if trainer.ckpt_path else None
        earlier_attempts = manifest.get("attempts") or []
        for earlier in earlier_attempts:
            if earlier["status"] == "running":
                earlier["status"] = "killed"
        self._attempts = [*earlier_attempts, attempt]
        self._began, self._planned = time.perf_counter(), planned_steps(trainer)
        self._facts = _fixed_facts(trainer, pl_module, self.config or {})
        self._write(trainer, "running")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "running")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The last hook of a fit: other callbacks have written their files.
        if self._facts is None and stage == "fit" and trainer.global_step:  # nothing was left: it was killed at its end
            self.on_train_start(trainer, pl_module)
        self._write(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, TrainingStopped | KeyboardInterrupt):
            self._write(trainer, "stopped")
        else:
            self._write(trainer, "failed", exception)

    def _write(self, trainer: Trainer, status: str, fault: BaseException | None = None) -> None:
        """Write the manifest, and for a run that has ended its assessment and page."""
        if self._facts is None:
            return
        folder = Path(trainer.default_root_dir)
        try:
            content = self._content(trainer, self._facts, status, fault)
            write_manifest(folder, content)
            if status == "running":
                return
            self._facts = None
            run = read_run(folder)
            assessment = assess(run)
            write_manifest(folder, content | {"assessment": asdict(assessment)})
            if status == "finished":
                say(" ".join(assessment.sentences))
                if (folder / ADAPTER_FOLDER / IDENTITY).exists():
                    say(f"Adapter: {folder / ADAPTER_FOLDER} (README.md there says how to load it)")
            if fault is not None and (isinstance(fault, RowDoesNotFit) or is_out_of_memory(fault)):
                # charts need memory too; without it OpenBLAS ends the process
                say(f"Report: `qlora-lightning report {folder}` makes it")
            else:
                say(f"Report: {write_run_page(folder)}")
            for purpose, command in next_steps(run, assessment)[:1]:
                say(f"Next, {purpose}: {command}")
        except Exception as error:  # a report must neither fail a trained run nor hide another error
            say(f"The report of the run could not be written: {type(error).__name__}: {error}")

    def _content(
        self, trainer: Trainer, facts: dict[str, Any], status: str, fault: BaseException | None
    ) -> dict[str, Any]:
        attempt, folder = self._attempts[-1], Path(trainer.default_root_dir)
        error = None if fault is None else f"{type(fault).__name__}: {fault}"
        attempt |= {"ended": _now(), "seconds": time.perf_counter() - self._began, "status": status, "error": error}
        attempt["to_step"] = trainer.global_step
        throughput, saver = find_callback(trainer, ThroughputMonitor), find_callback(trainer, AdapterCheckpoint)
        counted = throughput if throughput and throughput.enabled else None
        is_preference = getattr(trainer.lightning_module, "pairs", False)
        best = saver.best[0] if saver and saver.best else None
        command = ["qlora-lightning", "fit", "--config", str(folder / CONFIG)]
        command += ["--trainer.default_root_dir", f"{resolve_unnamed(folder)}-again"]
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        return {
            "status": status,
            "error": error,
            **facts,
            "command": attempt["command"],
            "reproduce": shlex.join(command) if self.config is not None else None,
            "progress": {
                "steps": trainer.global_step,
                "epoch": trainer.current_epoch,
                "tokens": counted.tokens_seen if counted else None,
                "rows" if is_preference else "labelled_tokens": round(counted.labelled_seen) if counted else None,
                "seconds": sum(entry["seconds"] for entry in self._attempts),
                "planned_steps": self._planned,
            },
            "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},  # JSON has no NaN
            "best": best and saver and {"monitor": saver.monitor, "value": best[0], "checkpoint": best[1]},
            "attempts": self._attempts,
        }


def _fixed_facts(trainer: Trainer, module: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that do not change once a run's model and data are loaded."""
    data = datamodule_of(trainer)
    reports = getattr(data, "reports", {})
    hashes = identity_of_data(trainer)
    settings, _ = hashes.pop("settings", {}), hashes.pop("samples", {})
    identity = {name: value for name, value in getattr(module, "identity", {}).items() if name != "data"}
    adapter = identity.pop("adapter", None)
    trainable, total = count_parameters(module)
    return {
        "written_by": f"qlora_lightning {__version__}",
        "base": identity,
        "adapter": adapter,
        "parameters": {"trainable": trainable, "all": total},
        "data": {
            "files": {split: value for split, value in getattr(data, "files", {}).items() if value is not None},
            "splits": {split: asdict(report) for split, report in reports.items()},
            "description": "\n".join(report.describe() for report in reports.values()),
            "hashes": hashes,
            "settings": settings,
        },
        "config": dict(config),
        "seed": None if data is None else data.state_dict().get("seed"),  # of the order of rows
        "device": _device_facts(trainer),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": _git_state(),
    }


def _device_facts(trainer: Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"  # its speed depends on the latter
    return {
        "kind": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "memory_gib": round(device_memory_gib(device), 2),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "nodes": trainer.num_nodes,
        "strategy": type(trainer.strategy).__name__,
    }


def _git_state() -> str | None:
    """Return the commit, with ``-dirty`` if tracked files were changed; ``None`` outside a repository, without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
