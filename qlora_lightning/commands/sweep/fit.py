"""One trial: a fit like any other, in a folder of its own, on the base of the trial before it."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from rich.text import Text

from qlora_lightning.callbacks import Evaluation, LoadingLines, MemoryComparison, StopSignals
from qlora_lightning.commands import training
from qlora_lightning.commands.config import read_configs, refuse_moved_run
from qlora_lightning.commands.sweep.built import check_built
from qlora_lightning.commands.sweep.dimensions import Dimension, show_value
from qlora_lightning.commands.sweep.judge import TrialJudge
from qlora_lightning.commands.sweep.trial import Trial, read_trial, write_trial
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.model.build import QLoRAModel
from qlora_lightning.model.checkpoint.setting_changes import describe_changes, find_changes
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import load_yaml
from qlora_lightning.support.trainer import callbacks_of, is_trial_run

# They judge a run at its end, or tell how to use it: a sweep does that for all of its trials.
_LEFT_OUT = (Evaluation, MemoryComparison, LoadingLines)
_MAY_DIFFER = {"trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.logger"}


class TrialCLI(QLoRACLI):
    """``fit`` of one value of a dimension; where its folder holds the finished trial, that is read instead.

    Args:
        args: Of LightningCLI.
        dimension: What is varied.
        value: Of this trial.
        spare: The model of the trial before, whose base is used again.
        kwargs: Of LightningCLI.

    Attributes:
        trial: The result.
        folder: The sweep's own.
        spare: The model of this trial, or of the one before if this one was only read.
    """

    def __init__(self, *args: Any, dimension: Dimension, value: Any, spare: QLoRAModel | None, **kwargs: Any) -> None:
        self._dimension, self._value, self.spare = dimension, value, spare
        self._judge = TrialJudge(functools.partial(check_built, dimension=dimension, value=value))
        self.trial: Trial | None = None
        super().__init__(*args, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        args = [*args, *self._dimension.options(self._value)]
        asked = self._parse(parser, args)["fit"]
        if asked.get("ckpt_path") not in (None, "last"):
            raise UserError("--ckpt_path: each trial of a sweep goes on from its own folder by itself; leave it out.")
        if self._dimension.setting != "learning_rate" and (asked["model"].get("init_args") or {}).get("adapter"):
            raise UserError(
                f"model.adapter: its own {self._dimension.title} rules, so that cannot be varied. Leave model.adapter "
                "out, or sweep --learning-rates."
            )
        refuse_moved_run(read_configs(args), asked["trainer"]["default_root_dir"])
        self.root = Path(asked["trainer"]["default_root_dir"])
        self.folder = self.root / self._dimension.folder
        own = self.folder / self._dimension.place(self._value)
        super().parse_arguments(parser, [*args, "--trainer.default_root_dir", str(own), "--ckpt_path", "last"])

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.world_size > 1:
            raise UserError(f"A sweep trains on one device, found {trainer.world_size}: add --trainer.devices 1.")
        if is_trial_run(trainer):
            raise UserError("trainer.fast_dev_run keeps nothing that trials could be compared by: leave it out.")
        kept = [each for each in callbacks_of(trainer) if not isinstance(each, _LEFT_OUT)]
        for stops in (each for each in kept if isinstance(each, StopSignals)):
            stops.tells_how = False  # the sweep does
        trainer.callbacks = [*kept, self._judge]
        return trainer

    def before_fit(self) -> None:
        """Read the trial if it is done, and keep its folder to these settings."""
        folder = Path(self.trainer.default_root_dir)
        self._refuse_other_settings(folder)
        self.trial = read_trial(folder)
        name = f"{self._dimension.title} {show_value(self._value)}"
        words = "done before" if self.trial else f"goes on in {folder}" if self._found else str(folder)
        rich.get_console().rule(Text.assemble((name, "bold"), " ", (words, "dim")), align="left")

    def fit(self, model: Any, **kwargs: Any) -> None:
        """Train and judge, unless that was done; in place of the trainer's own method."""
        if self.trial is None:
            model.spare = self.spare
            self.trainer.fit(model, **kwargs)
            self.trial = self._keep()
            self.spare = None if model.overrides("build_model") else model.made

    def _keep(self) -> Trial:
        judge, folder = self._judge, Path(self.trainer.default_root_dir)
        if judge.rows is None:
            raise UserError(f"{folder.name} ended before it was judged: start the same command again.")
        trial = Trial(
            folder.name, self._value, judge.parameters, judge.steps, judge.seconds, judge.validation, judge.rows
        )
        write_trial(folder, trial)
        return trial

    def _refuse_other_settings(self, folder: Path) -> None:
        file = folder / "config.yaml"
        if not file.exists():
            return
        try:
            stored = _flatten(load_yaml(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                f"{file} is not YAML any more: remove the folder of this trial, or name another."
            ) from error
        own = _flatten(yaml.safe_load(yaml.safe_dump(self._short_config())))
        changes = [change for change in find_changes(stored, own, "") if change[0].lstrip(".") not in _MAY_DIFFER]
        if changes:
            changes = [(name.lstrip("."), before, now) for name, before, now in changes]
            told = describe_changes(changes, "the trial's")
            raise UserError(
                f"{folder} holds a trial with other settings, which would be compared with these.\n"
                f"{told}\nPut them back, or name another folder by "
                "`--trainer.default_root_dir runs/NAME`."
            )


def run_trial(
    arguments: Sequence[str], dimension: Dimension, value: Any, spare: QLoRAModel | None
) -> tuple[Trial, Path, Path, QLoRAModel | None]:
    """Make one trial, or read it; return it, the sweep's folder, the run folder, and the next trial's ``spare``.

    Args:
        arguments: Options of ``fit``.
        dimension: What is varied.
        value: Of this trial.
        spare: The model of the trial before.

    Raises:
        UserError: A key or value is wrong, or the training cannot go on.
    """
    made: list[TrialCLI] = []

    def cli(*args: Any, **kwargs: Any) -> None:
        made.append(TrialCLI(*args, dimension=dimension, value=value, spare=spare, **kwargs))

    training.main(["fit", *arguments], functools.partial(cli), name="sweep-rank")
    (done,) = made
    assert done.trial is not None
    return done.trial, done.folder, done.root, done.spare


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict) or not config:
        return {prefix.removesuffix("."): config}
    return {name: value for key, inner in config.items() for name, value in _flatten(inner, f"{prefix}{key}.").items()}
