"""What is kept of a trial that has ended, in its folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lightning.commands.sweep.row_losses import RowLosses
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import write_whole

_FILE = "trial.json"
_VERSION = 1


@dataclass(frozen=True)
class Trial:
    """A training that has ended, judged on the validation rows.

    Attributes:
        name: Of its folder.
        value: Of the setting that the sweep varies.
        parameters: That trained.
        steps: Optimizer steps.
        seconds: Of the training, if one process did all of it.
        validation: Hash of the validation samples, where the data module knows one.
        rows: Losses of the validation rows.
    """

    name: str
    value: Any
    parameters: int
    steps: int
    seconds: float | None
    validation: str | None
    rows: RowLosses

    @property
    def loss(self) -> float:
        """On the validation rows, per labelled token."""
        return self.rows.loss


def write_trial(folder: Path, trial: Trial) -> None:
    """Put a trial into its folder: from then on it counts as done."""
    write_whole(folder / _FILE, json.dumps({"format_version": _VERSION, **asdict(trial)}) + "\n")


def read_trial(folder: Path) -> Trial | None:
    """Give the trial of a folder, if it was done.

    Raises:
        UserError: Its file is not ours, or damaged.
    """
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


def check_same_rows(trials: list[Trial]) -> None:
    """Refuse to compare losses on other validation rows.

    Raises:
        UserError: The rows of two trials differ.
    """
    first = trials[0]
    for trial in trials[1:]:
        known = first.validation is not None and trial.validation is not None
        if first.rows.tokens != trial.rows.tokens or (known and first.validation != trial.validation):
            raise UserError(
                f"{first.name} and {trial.name} were judged on different validation rows: the file has changed in "
                "between. Name another folder by `--trainer.default_root_dir runs/NAME`, and sweep anew."
            )
