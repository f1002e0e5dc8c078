"""The search itself: a fit that Lightning's tuner runs, in a folder that goes afterwards."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.tuner.tuning import Tuner

from qlora_lightning.callbacks import DryBatch, Evaluation, LoadingLines, MemoryComparison, PredictionWriter, RunReport
from qlora_lightning.callbacks.run_folder import RunFolder
from qlora_lightning.commands import training
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import callbacks_of

_LEFT_OUT = (Checkpoint, RunFolder, PredictionWriter, Evaluation, LoadingLines, MemoryComparison, RunReport, DryBatch)
_BETA = 0.98  # of Lightning's smoothing
_SKIPPED_FIRST = 10  # steps, whose smoothed losses know too few of them
_TRAINER: dict[str, Any] = {
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "max_epochs": -1,  # few rows come again, else the search would end with their epoch
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "num_sanity_val_steps": 0,
    "val_check_interval": None,
    "check_val_every_n_epoch": 2**31,  # the finder sets limit_val_batches itself
    "fast_dev_run": False,
    "barebones": False,
    "logger": False,
    "enable_checkpointing": None,
}


class SearchCLI(QLoRACLI):
    """``fit``, but that the tuner fits.

    Args:
        args: Of LightningCLI.
        folder: Takes the place of the run folder.
        rates: The first and the last.
        steps: Optimizer steps.
        kwargs: Of LightningCLI.

    Attributes:
        finder: Lightning's, with its results.
    """

    def __init__(self, *args: Any, folder: str, rates: tuple[float, float], steps: int, **kwargs: Any) -> None:
        self._folder, self._rates, self._steps = folder, rates, steps
        self.finder: Any = None
        super().__init__(*args, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        settings = self.config["fit"]
        settings["ckpt_path"] = None
        for key, value in {**_TRAINER, "max_steps": self._steps, "default_root_dir": self._folder}.items():
            settings["trainer"][key] = value

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks = [each for each in callbacks_of(trainer) if not isinstance(each, _LEFT_OUT)]
        return trainer

    def before_fit(self) -> None:
        """Leave the folder of a run alone, and refuse what the finder would search wrongly."""
        if getattr(self.model, "loraplus_ratio", None) is not None:
            raise UserError(
                "model.loraplus_ratio: Lightning's finder gives A and B the same rate, so it would search for another "
                "training than yours. Search without it, or compare rates by `sweep-rank --learning-rates`."
            )

    def fit(self, model: Any, datamodule: Any, **kwargs: Any) -> None:
        """Search, in place of the trainer's own method."""
        low, high = self._rates
        tuner = Tuner(self.trainer)
        self.finder = tuner.lr_find(
            model, datamodule=datamodule, min_lr=low, max_lr=high, num_training=self._steps, update_attr=False
        )
        found = self.finder.results["loss"]
        self.finder.results["loss"] = correct_smoothing(found, self.trainer.accumulate_grad_batches)


def correct_smoothing(losses: Sequence[float], accumulate: int) -> list[float]:
    """Undo what Lightning 2.6 does to the losses that it smooths, so that they start at the loss and not at half of it.

    It divides the running average by ``1 - beta ** (n + 1)`` at step n, counted from 1, where the average has the
    weight ``1 - beta ** n``; and each loss is already divided by the micro-batches of a step.

    Args:
        losses: As the finder gives them.
        accumulate: Micro-batches of a step.
    """
    return [accumulate * loss * (1 - _BETA ** (n + 1)) / (1 - _BETA**n) for n, loss in enumerate(losses, start=1)]


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Give the rate at which the loss falls most steeply over the logarithm of the rate (Smith 2017).

    Lightning 2.6 takes the slope over the rate itself, which is steepest wherever rates lie closest: at the first ones.

    Args:
        rates: Of the steps, rising.
        losses: Of the same steps, smoothed.

    Returns:
        The rate, ``None`` where there are too few finite losses. As in Lightning's finder the first ten and the last
        one are left out.
    """
    own = range(_SKIPPED_FIRST, len(losses) - 1)
    found = [(math.log(rates[step]), losses[step], rates[step]) for step in own if math.isfinite(losses[step])]
    if len(found) < 2:
        return None
    places, values, kept = (np.array(column) for column in zip(*found, strict=True))
    return float(kept[np.gradient(values, places).argmin()])


def search(arguments: Sequence[str], folder: str, min_lr: float, max_lr: float, steps: int) -> dict[str, Any]:
    """Search for a learning rate.

    Args:
        arguments: Options of ``fit``.
        folder: For what is written while it goes on.
        min_lr: Of the first step.
        max_lr: Of the last.
        steps: Optimizer steps.

    Returns:
        ``learning_rate`` and smoothed ``loss`` of each step, and the ``suggestion``, if there is one.

    Raises:
        UserError: A key or value is wrong.
    """
    made: list[SearchCLI] = []

    def cli(*args: Any, **kwargs: Any) -> None:
        made.append(SearchCLI(*args, folder=folder, rates=(min_lr, max_lr), steps=steps, **kwargs))

    training.main(["fit", *arguments], cli, name="lr-find")
    finder = made[0].finder
    suggestion = suggest_rate(finder.results["lr"], finder.results["loss"])
    return {
        "learning_rate": [float(rate) for rate in finder.results["lr"]],
        "loss": [float(loss) for loss in finder.results["loss"]],
        "suggestion": suggestion,
    }
