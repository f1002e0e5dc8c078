"""A fit of few steps that writes nothing: what it trains and how is ``fit``'s own."""

from typing import Any

from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers.logger import DummyLogger

from qlora_lightning.callbacks import (
    DryBatch,
    Evaluation,
    GPUMemoryMonitor,
    LoadingLines,
    MemoryComparison,
    PredictionWriter,
    RunReport,
    StopSignals,
)
from qlora_lightning.callbacks.run_folder import RunFolder
from qlora_lightning.commands.profile.recorder import BEFORE, StepRecorder
from qlora_lightning.commands.profile.scopes import ActionRanges
from qlora_lightning.commands.training import QLoRACLI

# They write, take part in no step, wait for a validation, or reset the peak of the device's memory.
_LEFT_OUT = (
    *(Checkpoint, RunFolder, StopSignals, PredictionWriter, Evaluation, LoadingLines, DryBatch),
    *(GPUMemoryMonitor, MemoryComparison, ProgressBar, RunReport, EarlyStopping),
)
_TRAINER: dict[str, Any] = {
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "max_epochs": -1,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "val_check_interval": None,
    "check_val_every_n_epoch": 1,
    "fast_dev_run": False,
    "barebones": False,
    "logger": False,
    "enable_checkpointing": None,  # False is refused beside AdapterCheckpoint, which goes below
    "enable_progress_bar": False,
}


class ProfileCLI(QLoRACLI):
    """``fit`` on one device, from fresh adapters, for as many steps as the recorder wants.

    Args:
        args: Of LightningCLI.
        recorder: Runs along.
        folder: Takes the place of the run folder.
        kwargs: Of LightningCLI.
    """

    def __init__(self, *args: Any, recorder: StepRecorder, folder: str, **kwargs: Any) -> None:
        self._recorder, self._folder = recorder, folder
        super().__init__(*args, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        settings = self.config["fit"]
        settings["ckpt_path"] = None
        steps = {"max_steps": BEFORE + self._recorder.steps, "default_root_dir": self._folder}
        for key, value in {**_TRAINER, **steps}.items():
            settings["trainer"][key] = value

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = super().instantiate_trainer(profiler=ActionRanges(self._recorder.scopes), **kwargs)
        trainer.loggers = [DummyLogger()]  # callbacks may log, to nowhere
        trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, _LEFT_OUT)] + [self._recorder]
        return trainer

    def before_fit(self) -> None:
        """Leave the folder of a run alone."""
