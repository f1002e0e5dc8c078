"""What a sweep has found: a table, a plot, figures, and the config that was chosen."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lightning.commands.options import write_json
from qlora_lightning.commands.sweep import Dimension, show_value
from qlora_lightning.commands.sweep.choice import Gain, Trial, measure_gain
from qlora_lightning.support.files import load_yaml, write_whole


def compare(dimension: Dimension, trials: Sequence[Trial]) -> tuple[str, list[Gain | None]]:
    """Return what trials are compared with, and each gain: over the one before if values rise, else the best."""
    if dimension.stops:
        pairs = itertools.pairwise(trials)
        return "the one before", [None, *(measure_gain(before.rows, after.rows) for before, after in pairs)]
    best = min(trials, key=lambda trial: trial.loss)
    return "the best", [None if trial is best else measure_gain(best.rows, trial.rows) for trial in trials]


def describe_last(dimension: Dimension, trials: Sequence[Trial]) -> Text:
    """Describe the trial that has just ended in a line."""
    against, gains = compare(dimension, trials)
    gain = "" if gains[-1] is None else f", gain over {against} {gains[-1]}"
    return Text(f"{dimension.title} {show_value(trials[-1].value)}: val_loss {trials[-1].loss:.4f}{gain}")


def print_table(dimension: Dimension, trials: Sequence[Trial], console: Console) -> None:
    """Print a line for each trial."""
    against, gains = compare(dimension, trials)
    title = f"val_loss of {len(trials[0].rows.nll):,} rows in nats per token; gain over {against}"
    table = Table(title=title, title_justify="left")
    for heading in (dimension.title, "parameters", "val_loss", "gain, 95 % interval", "time"):
        table.add_column(heading, justify="left" if heading == "target modules" else "right", no_wrap=True)
    for trial, gain in zip(trials, gains, strict=True):
        seconds = "" if trial.seconds is None else f"{trial.seconds:,.0f} s"
        cells = (f"{trial.parameters:,}", f"{trial.loss:.4f}", str(gain or ""), seconds)
        table.add_row(Text(show_value(trial.value)), *cells)
    console.print(table)


def write_results(
    folder: Path,
    run_folder: Path,
    dimension: Dimension,
    trials: Sequence[Trial],
    choice: tuple[Trial, str],
    min_gain: float,
) -> dict[str, Any]:
    """Write ``sweep.json``, ``sweep.png`` and ``chosen.yaml`` into the sweep's folder; return all figures.

    Args:
        folder: The sweep's folder, in which the trials' folders are.
        run_folder: Run folder of the chosen config.
        dimension: What was varied.
        trials: In their order.
        choice: The chosen trial, and why.
        min_gain: The least gain that counted.
    """
    chosen, why = choice
    against, gains = compare(dimension, trials)
    summary = {
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
            for trial, gain in zip(trials, gains, strict=True)
        ],
        "gain_is_over": against,
        "chosen": chosen.value,
        "why": why,
    }
    write_json(folder / "sweep.json", summary)
    config = load_yaml((folder / chosen.name / "config.yaml").read_text(encoding="utf-8"))
    config["trainer"]["default_root_dir"] = str(run_folder)
    write_whole(folder / "chosen.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    write_whole(folder / "sweep.png", _draw(dimension, trials, chosen))
    return summary


def _draw(dimension: Dimension, trials: Sequence[Trial], chosen: Trial) -> bytes:
    """Draw losses as points, and the intervals of the differences as bars.

    A bar shows where a trial's loss would be on other rows, were that of the trial it is compared with as it is.
    """
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes, blue = figure.subplots(), "#2a6fb0"
    against, gains = compare(dimension, trials)
    axes.plot(range(len(trials)), [trial.loss for trial in trials], color="#888888", linewidth=1, zorder=1)
    for place, (trial, gain) in enumerate(zip(trials, gains, strict=True)):
        if gain is not None:
            other = trial.loss + gain.value
            axes.vlines(place, other - gain.high, other - gain.low, color=blue, linewidth=2, zorder=2)
        filled = blue if trial is chosen else "white"
        axes.plot(place, trial.loss, "o", color=blue, markerfacecolor=filled, markersize=8, zorder=3)
    axes.set_xticks(range(len(trials)), [show_value(trial.value) for trial in trials])
    axes.set_xlabel(dimension.title)
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(f"Filled: chosen. Bars: 95 % interval of the difference from {against}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    picture = io.BytesIO()
    figure.savefig(picture)
    return picture.getvalue()
