"""Writes what a run was into its folder: the manifest while it goes on, the page when it ends."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from qlora_lightning.callbacks.run_facts import find_early_stop, fixed_facts, planned_steps, progress_facts
from qlora_lightning.callbacks.run_warnings import RunWarnings, TakesWarnings
from qlora_lightning.callbacks.started_folder import goes_on
from qlora_lightning.report.page import write_run_page
from qlora_lightning.report.run import read_manifest, write_manifest
from qlora_lightning.support.console import describe, say
from qlora_lightning.support.errors import TrainingStopped, UserError
from qlora_lightning.support.trainer import is_trial_run


class RunReport(TakesWarnings):
    """Write ``manifest.json`` at the start, at each validation and at the end of a fit, and then ``report.html``.

    Also where a fit ends early, by a signal or an error. A run that was resumed has several lives, each with its
    begin, end and steps; seconds and warnings are those of all of them. Nothing of it enters a checkpoint.

    Args:
        config: The run's whole config; ``None``: what module, data and Trainer say of themselves.
        command: What was typed, word by word; ``None``: what started this process.
        enabled: ``False`` writes nothing.
    """

    def __init__(
        self, config: Mapping[str, Any] | None = None, command: Sequence[str] | None = None, enabled: bool = True
    ) -> None:
        self.config = config
        self.command = list(sys.orig_argv if command is None else command)
        self.enabled = enabled
        self.warnings = RunWarnings()
        self._clear()

    def _clear(self) -> None:
        self._facts: dict[str, Any] | None = None  # of a run that has begun
        self._lives: list[dict[str, Any]] = []  # the last one is going on
        self._trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._clear()
        if stage == "fit" and self._writes(trainer):
            self.warnings.counts.clear()
            self.warnings.listen()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)
        if self._facts is not None:
            self._facts["planned_steps"] = planned_steps(trainer)
            self._lives[-1]["from_step"] = trainer.global_step
            self._write(trainer, "running")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, "running")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The last hook of a fit: what other callbacks leave in the folder at its end is there.
        self._end(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        stopped = isinstance(exception, TrainingStopped | KeyboardInterrupt)
        if stopped:
            self._end(trainer, "finished" if self._trained else "stopped")
        else:
            self._end(trainer, "failed", f"{type(exception).__name__}: {exception}")

    def _writes(self, trainer: Trainer) -> bool:
        return self.enabled and trainer.is_global_zero and not is_trial_run(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down what is fixed; not before all hooks have had the chance to refuse the folder."""
        if self._facts is not None or not self._writes(trainer):
            return
        earlier = _read_earlier(trainer)
        self._facts = fixed_facts(trainer, pl_module, self.config)
        self._lives = earlier.get("lives", [])
        for warning in earlier.get("warnings", []):
            self.warnings.counts.setdefault(warning["text"], warning["count"])
        self._began = time.perf_counter()
        resumed_from = str(trainer.ckpt_path) if trainer.ckpt_path else None
        self._lives.append({"started": _now(), "command": shlex.join(self.command), "resumed_from": resumed_from})

    def _end(self, trainer: Trainer, status: str, error: str | None = None) -> None:
        self.warnings.stop()
        if self._facts is not None:
            self._write(trainer, status, error, with_page=True)
            self._facts = None

    def _write(self, trainer: Trainer, status: str, error: str | None = None, with_page: bool = False) -> None:
        if self._facts is None:
            return
        folder = Path(trainer.default_root_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = self._content(trainer, status, error)
            write_manifest(folder, content)
            if with_page:
                if content["stopped_early"] is not None:  # Lightning says that max_epochs was reached
                    describe(f"Stopped early, at step {trainer.global_step:,}: {content['stopped_early']}")
                describe(f"Report: {write_run_page(folder)}")
        except Exception as fault:  # a run that has trained does not fail for its report, nor one that fails for both
            say(f"The report of the run could not be written: {type(fault).__name__}: {fault}")

    def _content(self, trainer: Trainer, status: str, error: str | None) -> dict[str, Any]:
        life, facts = self._lives[-1], progress_facts(trainer, ended=status != "running")
        life |= {"ended": _now(), "seconds": time.perf_counter() - self._began, "status": status, "error": error}
        life["to_step"] = trainer.global_step
        facts["progress"]["seconds"] = sum(each["seconds"] for each in self._lives)
        fixed = dict(self._facts or {})
        planned = facts["progress"]["planned_steps"] = fixed.pop("planned_steps", None)
        would_end_here = planned is not None and trainer.global_step >= planned
        noted = [{"text": text, "count": count} for text, count in self.warnings.counts.items()]
        again = _reproduction(Path(trainer.default_root_dir)) if self.config is not None else None
        return {
            "status": status,
            "error": error,
            **fixed,
            "command": life["command"],
            "reproduce": again,
            **facts,
            "stopped_early": None if would_end_here else find_early_stop(trainer),
            "lives": self._lives,
            "warnings": noted,
        }


def _read_earlier(trainer: Trainer) -> dict[str, Any]:
    """Read the manifest of the run that goes on; of another run's folder nothing is taken over."""
    if not goes_on(trainer):
        return {}
    try:
        return read_manifest(Path(trainer.default_root_dir)) or {}
    except UserError as fault:
        say(f"{fault} The lives of this run before are not told in its report.")
        return {}


def _reproduction(folder: Path) -> str:
    target = folder.with_name(f"{folder.name}-again")
    words = ["qlora-lightning", "fit", "--config", str(folder / "config.yaml")]
    return shlex.join([*words, "--trainer.default_root_dir", str(target)])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
