"""One trial: a fit like any other, in a folder of its own, on the base of the trial before, judged at its end."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import rich
import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from peft.tuners.lora import LoraLayer
from rich.text import Text
from torch import nn

from qlora_lightning.callbacks import AdapterCheckpoint, Evaluation, LoadingLines, MemoryComparison, StopSignals
from qlora_lightning.commands.config import refuse_moved_run
from qlora_lightning.commands.sweep import Dimension, show_value, trial_name
from qlora_lightning.commands.sweep.choice import RowLosses, Trial
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.evaluation.judge import losses_of_rows
from qlora_lightning.model.adapters.identity import identity_of_data
from qlora_lightning.model.adapters.lora import ADAPTER, copy_tensors, trainable_tensors
from qlora_lightning.model.adapters.targets import select_targets
from qlora_lightning.model.batch import cut_into_rows
from qlora_lightning.model.build import QLoRAModel
from qlora_lightning.model.checkpoint.setting_changes import describe_changes, find_changes
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import load_yaml, write_whole
from qlora_lightning.support.trainer import callbacks_of, is_trial_run

# They judge a run at its end, or tell how to use it: a sweep does that for all of its trials.
_LEFT_OUT = (Evaluation, MemoryComparison, LoadingLines)
_MAY_DIFFER = {"trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.logger"}
_FILE, _VERSION = "trial.json", 1


def run_trial(arguments: Sequence[str], dimension: Dimension, value: Any, spare: QLoRAModel | None) -> "TrialCLI":
    """Make one trial, or read it.

    Args:
        arguments: Options of ``fit``.
        dimension: What is varied.
        value: Value of this trial.
        spare: The model of the trial before.
    """
    trial = TrialCLI(arguments, dimension, value, spare)
    trial.run()
    return trial


class TrialCLI(QLoRACLI):
    """``fit`` of one value of a dimension; if its folder holds the finished trial, that is read instead.

    Args:
        args: Options of ``fit``.
        dimension: What is varied.
        value: Value of this trial.
        spare: The model of the trial before, whose base is used again.

    Attributes:
        judged: The result.
        folder: The sweep's own folder.
        root: The run folder around it.
        spare: The model of this trial, or of the one before if this one was only read.
    """

    judged: Trial

    def __init__(self, args: Sequence[str], dimension: Dimension, value: Any, spare: QLoRAModel | None) -> None:
        self._dimension, self._value, self.spare = dimension, value, spare
        self._judge = TrialJudge(dimension, value)
        super().__init__(args, "fit")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        setting = self._dimension.setting
        args = [*args, f"--model.{setting}", show_value(self._value)]
        if setting == "rank":  # the update is alpha / rank · B A x: with alpha = 2 × rank each rank acts as strongly
            args += ["--model.alpha", "null"]
        asked = self.parse(args)
        if asked.get("ckpt_path") not in (None, "last"):
            raise UserError("--ckpt_path: each trial of a sweep resumes from its own folder by itself; leave it out.")
        if setting != "learning_rate" and (asked["model"].get("init_args") or {}).get("adapter"):
            raise UserError(
                f"model.adapter: its own {self._dimension.title} rules, so that cannot be varied. Leave model.adapter "
                "out, or sweep --learning-rates."
            )
        refuse_moved_run(self.configs, asked["trainer"]["default_root_dir"])
        self.root = Path(asked["trainer"]["default_root_dir"])
        self.folder = self.root / self._dimension.folder
        own = self.folder / trial_name(self._dimension, self._value)
        super().parse_arguments(parser, [*args, "--trainer.default_root_dir", str(own), "--ckpt_path", "last"])

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.world_size > 1:
            raise UserError(f"A sweep trains on one device, found {trainer.world_size}: add --trainer.devices 1.")
        if is_trial_run(trainer):
            raise UserError("trainer.fast_dev_run keeps nothing that trials could be compared by: leave it out.")
        callbacks = [each for each in callbacks_of(trainer) if not isinstance(each, _LEFT_OUT)]
        for stops in (each for each in callbacks if isinstance(each, StopSignals)):
            stops.tells_how = False  # the sweep does
        trainer.callbacks = [*callbacks, self._judge]
        return trainer

    def run(self) -> None:
        """Read the trial if it is done, else train and judge; its folder is kept to these settings."""
        folder = Path(self.trainer.default_root_dir)
        self._refuse_other_settings(folder)
        judged = _read_trial(folder)
        if judged is not None:
            self.judged = judged
        name = f"{self._dimension.title} {show_value(self._value)}"
        words = "done before" if judged else f"resumes in {folder}" if self.checkpoint else str(folder)
        rich.get_console().rule(Text.assemble((name, "bold"), " ", (words, "dim")), align="left")
        if judged is not None:
            return
        model: Any = self.model
        model.spare = self.spare
        self.trainer.fit(model, datamodule=self.datamodule, ckpt_path=self.checkpoint)
        self.spare = None if model.overrides("build_model") else model.made
        judge = self._judge
        if judge.rows is None:
            raise UserError(f"{folder.name} ended before it was judged: start the same command again.")
        counts = judge.parameters, self.trainer.global_step, judge.seconds
        self.judged = Trial(folder.name, self._value, *counts, judge.validation, judge.rows)
        # from then on it counts as done
        write_whole(folder / _FILE, json.dumps({"format_version": _VERSION, **asdict(self.judged)}) + "\n")

    def _refuse_other_settings(self, folder: Path) -> None:
        file = folder / "config.yaml"
        if not file.exists():
            return
        stored = _flatten(load_yaml(file.read_text(encoding="utf-8")))
        own = _flatten(yaml.safe_load(yaml.safe_dump(self._short_config())))
        changes = [(name.lstrip("."), before, now) for name, before, now in find_changes(stored, own, "")]
        changes = [change for change in changes if change[0] not in _MAY_DIFFER]
        if changes:
            listed = describe_changes(changes, "the trial's")
            raise UserError(
                f"{folder} holds a trial with other settings, which would be compared with these.\n{listed}\n"
                "Put them back, or choose another folder by `--trainer.default_root_dir runs/NAME`."
            )


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict) or not config:
        return {prefix.removesuffix("."): config}
    return {name: value for key, inner in config.items() for name, value in _flatten(inner, f"{prefix}{key}.").items()}


def _read_trial(folder: Path) -> Trial | None:
    """Return the trial of a folder, if it was done."""
    file = folder / _FILE
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format_version") != _VERSION:
            raise ValueError("another format version")
        return Trial(**{**content, "rows": RowLosses(**content["rows"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read as the result of a trial: {error}. Remove it, and the trial is judged again."
        ) from error


# ---- judging ---------------------------------------------------------------------------------------------------------


class TrialJudge(Callback):
    """Refuse a trial without validation rows or with another adapter; judge its best adapter when training has ended.

    Attributes:
        rows: Losses of the validation rows; ``None`` until they are judged.
        parameters: How many train.
        seconds: Duration of the training; ``None`` if another process began it.
        validation: Hash of the validation samples, if the data module knows one.
    """

    def __init__(self, dimension: Dimension, value: Any) -> None:
        self._dimension, self._value = dimension, value
        self.rows: RowLosses | None = None
        self.parameters = 0
        self.seconds: float | None = None
        self.validation: str | None = None
        self._began: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        samples = getattr(getattr(trainer, "datamodule", None), "samples", None)
        if (isinstance(samples, dict) and "val" not in samples) or not trainer.limit_val_batches:
            raise UserError(
                "A sweep compares trials on validation rows, and there are none: name a file in data.val, or hold "
                "some out by data.val_fraction: 0.1 (and leave trainer.limit_val_batches above 0)."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_built(pl_module, self._dimension, self._value)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic() if trainer.global_step == 0 else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = None if self._began is None else time.monotonic() - self._began

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            raise UserError("No optimizer step was taken: trainer.limit_train_batches and max_steps must not be 0.")
        writer = next((each for each in callbacks_of(trainer) if isinstance(each, AdapterCheckpoint)), None)
        best = writer.read_best(trainer.default_root_dir) if writer else None
        if best is not None:
            copy_tensors(pl_module, best, "The best adapter")
        self.parameters = sum(tensor.numel() for tensor in trainable_tensors(pl_module).values())
        self.validation = identity_of_data(trainer).get("val")
        self.rows = judge_rows(pl_module, trainer)


def judge_rows(module: Any, trainer: Any) -> RowLosses:
    """Compute the loss of each validation row alone, by the module's own ``compute_loss``, without gradients."""
    nll: list[float] = []
    tokens: list[int] = []
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for batch in _validation_batches(trainer):
                rows = cut_into_rows(batch)
                if not rows:
                    raise UserError(
                        "A sweep compares validation rows one by one, and the validation loader gives batches of "
                        "another make than InstructionDataModule's: they cannot be cut into rows."
                    )
                for sums in losses_of_rows(module, [trainer.strategy.batch_to_device(row) for row in rows]):
                    if int(sums.labelled_tokens):  # a filler has none
                        nll.append(float(sums.nll_sum))
                        tokens.append(int(sums.labelled_tokens))
    finally:
        module.train(was_training)
    return RowLosses(nll, tokens)


def _validation_batches(trainer: Any) -> Iterator[Any]:
    """Yield as many batches as the trainer validates on, until a signal asks to stop."""
    # If nothing was left to train, the trainer has made no loader.
    loader = trainer.val_dataloaders or trainer.datamodule.val_dataloader()
    limit = trainer.limit_val_batches
    most = limit if isinstance(limit, int) else int(len(loader) * limit)
    stop = next((each for each in callbacks_of(trainer) if isinstance(each, StopSignals)), None)
    for batch in itertools.islice(iter(loader), most):
        if stop is not None and stop.received is not None:
            stop.end(trainer, "Stopped while the trial was judged.")
        yield batch


def check_built(module: Any, dimension: Dimension, value: Any) -> None:
    """Refuse to train an adapter that is not the trial's, since a ``build_model`` may ignore the setting.

    Trials would be one training under several names.
    """
    model = module.model
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    adapted = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    found = ""
    if dimension.setting == "rank":
        ranks = {layer.r.get(ADAPTER, 0) for layer in adapted.values()}
        if value not in ranks:  # rank_pattern may give some modules another one
            found = f"rank {' and '.join(map(str, sorted(ranks))) or 'none'}"
    elif dimension.setting == "target_modules":
        inside = tuple(f"{name}." for name in adapted)
        linears = [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear | nn.Embedding)]
        candidates = [*adapted, *(name for name in linears if not name.startswith(inside))]
        layers = module.adapter_options["layers"]
        targets = {each: set(select_targets(candidates, each, layers)) for each in dimension.values}  # or one is wrong
        if targets[value] != set(adapted):
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in adapted})) or "no module"
            found = f"adapters on {kinds}"
    if found:
        raise UserError(
            f"A trial of model.{dimension.setting} {show_value(value)} would train {found}: build_model of "
            f"{type(module).__name__}, or model.lora_options, ignores self.adapter_options[{dimension.setting!r}]."
        )
