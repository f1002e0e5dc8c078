"""What a sweep has found: a table, a plot, figures, and the config that was chosen."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lightning.commands.output import write_json
from qlora_lightning.commands.sweep.dimensions import Dimension, show_value
from qlora_lightning.commands.sweep.gain import Gain, measure_gain
from qlora_lightning.commands.sweep.trial import Trial
from qlora_lightning.support.files import load_yaml, write_whole

CHOSEN = "chosen.yaml"


def compared(dimension: Dimension, trials: Sequence[Trial]) -> list[Gain | None]:
    """Give each trial's gain over the one before it, or, where the order means nothing, over the best one."""
    if dimension.stops:
        pairs = itertools.pairwise(trials)
        return [None, *(measure_gain(before.rows, after.rows) for before, after in pairs)]
    best = min(trials, key=lambda trial: trial.loss)
    return [None if trial is best else measure_gain(best.rows, trial.rows) for trial in trials]


def describe_last(dimension: Dimension, trials: Sequence[Trial]) -> Text:
    """Say in a line what came of the trial that has just ended."""
    trial, gain = trials[-1], compared(dimension, trials)[-1]
    words = f"val_loss {trial.loss:.4f}"
    if gain is not None:
        words += f", gain over {'the one before' if dimension.stops else 'the best'} {_show(gain)}"
    return Text(f"{dimension.title} {show_value(trial.value)}: {words}")


def _show(gain: Gain) -> str:
    return f"{gain.value:.4f} [{gain.low:.4f}, {gain.high:.4f}]"


def print_table(dimension: Dimension, trials: Sequence[Trial], console: Console) -> None:
    """Print a line for each trial."""
    against = "the one before" if dimension.stops else "the best"
    title = f"val_loss of {len(trials[0].rows.nll):,} rows in nats per token; gain over {against}"
    table = Table(title=title, title_justify="left")
    for heading in (dimension.title, "parameters", "val_loss", "gain, 95 % interval", "time"):
        table.add_column(heading, justify="left" if heading == "target modules" else "right", no_wrap=True)
    for trial, gain in zip(trials, compared(dimension, trials), strict=True):
        words = "" if gain is None else _show(gain)
        table.add_row(
            Text(show_value(trial.value)),
            f"{trial.parameters:,}",
            f"{trial.loss:.4f}",
            words,
            "" if trial.seconds is None else f"{trial.seconds:,.0f} s",
        )
    console.print(table)


def summarize(
    dimension: Dimension, trials: Sequence[Trial], chosen: Trial, why: str, min_gain: float
) -> dict[str, Any]:
    """Give all figures as plain values."""
    return {
        "setting": f"model.{dimension.setting}",
        "min_gain": min_gain,
        "rows": len(trials[0].rows.nll),
        "trials": [
            {
                "value": trial.value,
                "folder": trial.name,
                "parameters": trial.parameters,
                "steps": trial.steps,
                "seconds": trial.seconds,
                "val_loss": trial.loss,
                "gain": None if gain is None else gain._asdict(),
            }
            for trial, gain in zip(trials, compared(dimension, trials), strict=True)
        ],
        "gain_is_over": "the one before" if dimension.stops else "the best",
        "chosen": chosen.value,
        "why": why,
    }


def write_results(folder: Path, run_folder: Path, chosen: Trial, summary: dict[str, Any]) -> Path:
    """Write ``sweep.json`` and the chosen config into the sweep's folder; gives the config's path.

    Args:
        folder: The sweep's, in which the trials' folders lie.
        run_folder: Where the chosen config's own run shall go.
        chosen: The trial whose config it is.
        summary: See :func:`summarize`.
    """
    write_json(folder / "sweep.json", summary)
    config = load_yaml((folder / chosen.name / "config.yaml").read_text(encoding="utf-8"))
    config["trainer"]["default_root_dir"] = str(run_folder)
    write_whole(folder / CHOSEN, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return folder / CHOSEN
