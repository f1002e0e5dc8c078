"""One trial: a fit like any other, in a folder of its own, evaluated at its end."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser
from rich.text import Text

from qlora_lightning.callbacks import Evaluation, LoadingLines, StopSignals
from qlora_lightning.callbacks.adapter_checkpoint import best_adapter
from qlora_lightning.callbacks.evaluation import validation_batches
from qlora_lightning.callbacks.run_folder import refuse_links
from qlora_lightning.commands.config import refuse_moved_run
from qlora_lightning.commands.sweep import Sweep
from qlora_lightning.commands.sweep.results import Trial
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.evaluation.comparison import RowResult
from qlora_lightning.evaluation.rows import evaluate_rows
from qlora_lightning.model.adapters.identity import describe_adapter, identity_of_data
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.adapters.targets import resolve_targets
from qlora_lightning.model.checkpoint.resume import describe_changes, find_changes
from qlora_lightning.report.facts import flatten
from qlora_lightning.support.console import terminal
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import CONFIG, load_yaml, read_json_object, write_whole
from qlora_lightning.support.trainer import callbacks_of, datamodule_of, find_callback, is_trial_run

# They evaluate a run at its end, or tell how to use it: a sweep does that for all of its trials.
_LEFT_OUT = (Evaluation, LoadingLines)
_MAY_DIFFER = {"trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.logger"}
_FILE, _VERSION = "trial.json", 2


def run_trial(arguments: Sequence[str], sweep: Sweep, value: Any) -> "TrialCLI":
    """Train and evaluate one trial, or read it; ``arguments`` are options of ``fit``."""
    trial = TrialCLI(arguments, sweep, value)
    trial.run()
    return trial


class TrialCLI(QLoRACLI):
    """``fit`` of one value; if its folder holds the finished trial, that is read instead.

    Attributes:
        trial: The result, when there is one.
        run_folder: The run folder in which the sweep's is.
        folder: The sweep's own folder.
    """

    trial: Trial

    def __init__(self, args: Sequence[str], sweep: Sweep, value: Any) -> None:
        self._sweep, self._value = sweep, value
        self._evaluation = TrialEvaluation(sweep, value)
        super().__init__(args, "fit")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        setting = self._sweep.setting
        args = [*args, f"--model.{setting}", str(self._value)]
        if setting == "rank":  # the update is alpha / rank · B A x: with alpha = 2 × rank each rank acts as strongly
            args += ["--model.alpha", "null"]
        asked = self.parse(args)
        if asked.get("ckpt_path") not in (None, "last"):
            raise UserError("--ckpt_path: each trial of a sweep resumes from its own folder by itself; leave it out.")
        if setting != "learning_rate" and (asked["model"].get("init_args") or {}).get("adapter"):
            raise UserError(
                f"model.adapter brings its own {self._sweep.name}: leave it out, or sweep --learning-rates."
            )
        refuse_moved_run(self.configs, asked["trainer"]["default_root_dir"])
        self.run_folder = Path(asked["trainer"]["default_root_dir"])
        self.folder = self.run_folder / self._sweep.folder
        own = self.folder / self._sweep.trial_folder(self._value)
        refuse_links(self.folder, own)
        self._command = ["qlora-lightning", "fit", *args, "--trainer.default_root_dir", str(own)]
        super().parse_arguments(parser, [*args, "--trainer.default_root_dir", str(own), "--ckpt_path", "last"])

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.world_size > 1:
            raise UserError(f"A sweep trains on one device, found {trainer.world_size}: add --trainer.devices 1.")
        if is_trial_run(trainer):
            raise UserError("trainer.fast_dev_run keeps nothing that trials could be compared by: leave it out.")
        callbacks = [each for each in callbacks_of(trainer) if not isinstance(each, _LEFT_OUT)]
        stops = find_callback(trainer, StopSignals)
        if stops is not None:
            stops.explains_resume = False  # the sweep does
        trainer.callbacks = [*callbacks, self._evaluation]
        return trainer

    def run(self) -> None:
        """Read the trial if it is done, else train and evaluate it; its folder is kept to these settings."""
        folder = Path(self.trainer.default_root_dir)
        self._refuse_other_settings(folder)
        file, state = folder / _FILE, f"resumes in {folder}" if self.checkpoint else str(folder)
        stored = read_json_object(file, "Remove it, and the trial is evaluated again.") if file.exists() else {}
        if stored.pop("format_version", None) == _VERSION:
            self.trial, state = Trial(**stored), "done before"
        title = Text.assemble((f"{self._sweep.name} {self._value}", "bold"), " ", (state, "dim"))
        terminal().rule(title, align="left")
        if hasattr(self, "trial"):
            return
        model: Any = self.model
        self.trainer.fit(model, datamodule=self.datamodule, ckpt_path=self.checkpoint)
        results = self._evaluation.results
        if results is None:
            raise UserError(f"{folder.name} ended before it was evaluated: start the same command again.")
        self.trial = Trial(
            folder=folder.name,
            value=self._value,
            parameters=sum(tensor.numel() for tensor in trainable_tensors(model).values()),
            steps=self.trainer.global_step,
            seconds=self._evaluation.time_elapsed(),
            validation=identity_of_data(self.trainer).get("val"),
            nll=[row.nll for row in results],
            tokens=[row.labelled_tokens for row in results],
        )
        # from then on it counts as done
        write_whole(folder / _FILE, json.dumps({"format_version": _VERSION, **asdict(self.trial)}) + "\n")

    def _refuse_other_settings(self, folder: Path) -> None:
        file = folder / CONFIG
        if not file.exists():
            return
        stored = flatten(load_yaml(file.read_text(encoding="utf-8")) or {})
        own = flatten(yaml.safe_load(yaml.safe_dump(self._short_config())))
        changes = [(name.lstrip("."), before, now) for name, before, now in find_changes(stored, own, "")]
        changes = [change for change in changes if change[0] not in _MAY_DIFFER]
        if changes:
            listed = describe_changes(changes, "the trial's")
            raise UserError(
                f"{folder} holds a trial with other settings, which would be compared with these.\n{listed}\n"
                "Put them back, or choose another folder by `--trainer.default_root_dir runs/NAME`."
            )


class TrialEvaluation(Timer):
    """Reject a trial that could not be compared; compute losses of its best adapter when training has ended.

    Attributes:
        results: Of the validation rows; ``None`` until they are evaluated.
    """

    def __init__(self, sweep: Sweep, value: Any) -> None:
        super().__init__()
        self._sweep, self._value = sweep, value
        self.results: list[RowResult] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        samples = getattr(datamodule_of(trainer), "samples", None)
        if (isinstance(samples, dict) and "val" not in samples) or not trainer.limit_val_batches:
            raise UserError(
                "A sweep compares trials on validation rows, and there are none: name a file in data.val, or hold "
                "some out by data.val_fraction: 0.1 (and leave trainer.limit_val_batches above 0)."
            )

    def on_fit_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        check_built(args[0], self._sweep, self._value)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def stop_if_asked(_: int) -> None:
            stops = find_callback(trainer, StopSignals)
            if stops is not None and stops.received is not None:
                stops.end(trainer, "Stopped while the trial was evaluated.")

        with best_adapter(trainer, pl_module):
            self.results = evaluate_rows(pl_module, validation_batches(trainer), watch=stop_if_asked)


def check_built(module: Any, sweep: Sweep, value: Any) -> None:
    """Reject an adapter that is not the trial's: a ``build_model`` that ignores the setting trains one again and again.

    Target modules of all trials are looked for, before hours go into the first.
    """
    if sweep.setting == "learning_rate":
        return
    built, asked = describe_adapter(module.model)[sweep.setting], value
    if sweep.setting == "target_modules":
        base, layers = module.model.get_base_model(), module.adapter_options["layers"]
        targets = {each: resolve_targets(base, each, layers) for each in sweep.values}
        asked = sorted({name.rpartition(".")[2] for name in targets[value]})
    if built != asked:
        raise UserError(
            f"A trial of model.{sweep.setting} {value} would train {sweep.name} {built}: build_model of "
            f"{type(module).__name__} ignores self.adapter_options[{sweep.setting!r}]."
        )
