"""What a sweep has found: trials compared row by row, which is chosen, and a table, a plot and files of it."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from qlora_lightning.commands.options import write_output
from qlora_lightning.commands.sweep import Sweep
from qlora_lightning.evaluation.comparison import Interval, measure
from qlora_lightning.evaluation.report import format_interval, plain_interval
from qlora_lightning.support.console import terminal
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import CONFIG, load_yaml


@dataclass(frozen=True)
class Trial:
    """A training that has ended, and its losses on the validation rows.

    Attributes:
        folder: Name of its folder.
        value: Value of the setting that the sweep varies.
        parameters: How many trained.
        steps: Optimizer steps.
        seconds: Duration of the training.
        validation: Hash of the validation samples, if the data module knows one.
        nll: Summed negative log-likelihood of each row's labelled tokens, in nats.
        tokens: Labelled tokens of each row.
    """

    folder: str
    value: Any
    parameters: int
    steps: int
    seconds: float
    validation: str | None
    nll: list[float]
    tokens: list[int]

    @property
    def loss(self) -> float:
        """The mean over all labelled tokens of the validation rows, in nats."""
        return sum(self.nll) / max(1, sum(self.tokens))


def check_same_rows(trials: Sequence[Trial]) -> None:
    """Reject losses on other validation rows: they cannot be compared."""
    first, last = trials[0], trials[-1]
    if (first.tokens, first.validation) != (last.tokens, last.validation):
        raise UserError(
            f"{first.folder} and {last.folder} have other validation rows: the file has changed in between. Choose "
            "another folder by `--trainer.default_root_dir runs/NAME`, and sweep again."
        )


# ---- which trial is chosen -------------------------------------------------------------------------------------------


def measure_gain(before: Trial, after: Trial) -> Interval:
    """Return by how many nats per token the loss is lower than before, by a paired bootstrap over rows.

    Efron and Tibshirani 1993, chapter 13. The interval says what other validation rows would do, not what another seed
    of the training would.
    """
    earlier, later = (list(zip(each.nll, each.tokens, strict=True)) for each in (before, after))
    return measure("loss", {"after": later, "before": earlier}).differences["before"]


def find_gains(sweep: Sweep, trials: Sequence[Trial]) -> list[Interval | None]:
    """Return each trial's gain: over the one before if values rise, else over the best, which itself has none."""
    if sweep.rises:
        return [None, *(measure_gain(*pair) for pair in itertools.pairwise(trials))]
    best = min(trials, key=lambda trial: trial.loss)
    return [None if trial is best else measure_gain(best, trial) for trial in trials]


def is_done(sweep: Sweep, trials: Sequence[Trial]) -> bool:
    """Whether no further value needs to be tried."""
    if len(trials) == len(sweep.values):
        return True
    return sweep.rises and len(trials) > 1 and not _pays(sweep, measure_gain(*trials[-2:]))


def choose(sweep: Sweep, trials: Sequence[Trial]) -> tuple[Trial, str]:
    """Choose one of at least two trials; return it, and why in a sentence or two.

    Of ranks, it is the last one that paid over the one before it. Of anything else, it is the one with the fewest
    parameters among those that the best does not beat by more than noise, and of equals the one of the lowest loss.
    """
    if sweep.rises:
        before, last = trials[-2:]
        gain = measure_gain(before, last)
        if _pays(sweep, gain):
            return last, f"Each {sweep.name} paid over the one before it: a larger one may pay too."
        return before, f"{sweep.name.capitalize()} {last.value} does not pay: it gains {_format(gain)} nats per token."
    best = min(trials, key=lambda trial: trial.loss)
    near = [trial for trial in trials if trial is best or not _pays(sweep, measure_gain(trial, best))]
    chosen = min(near, key=lambda trial: (trial.parameters, trial.loss))
    if len(near) == 1:
        return chosen, "It has the lowest loss, and each other is worse by more than noise."
    names = ", ".join(str(trial.value) for trial in near)
    return (
        chosen,
        f"Within noise of the lowest loss: {names}. It has the fewest parameters, or of equals the lowest loss.",
    )


def _pays(sweep: Sweep, gain: Interval) -> bool:
    return gain.low > 0 and gain.value >= sweep.min_gain


def _format(gain: Interval | None) -> str:
    return "" if gain is None else format_interval(gain, percent=False, sign="+", digits=4)


# ---- table, plot and files -------------------------------------------------------------------------------------------


def print_table(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Print a line for each trial."""
    title = f"val_loss of {len(trials[0].nll):,} rows in nats per token; gain over {_compared_with(sweep)}"
    table = Table(title=title, title_justify="left")
    for heading in (sweep.name, "parameters", "val_loss", "gain, 95 % interval", "time"):
        table.add_column(heading, justify="left" if heading == "target modules" else "right", no_wrap=True)
    for trial, gain in zip(trials, find_gains(sweep, trials), strict=True):
        cells = f"{trial.parameters:,}", f"{trial.loss:.4f}", Text(_format(gain)), f"{trial.seconds:,.0f} s"
        table.add_row(Text(str(trial.value)), *cells)
    terminal().print(table)


def _compared_with(sweep: Sweep) -> str:
    return "the one before" if sweep.rises else "the best"


def write_results(
    folder: Path, run_folder: Path, sweep: Sweep, trials: Sequence[Trial], chosen: Trial, why: str
) -> dict[str, Any]:
    """Write ``sweep.json``, ``sweep.png`` and ``chosen.yaml`` into the sweep's folder; return all figures."""
    names = ("value", "folder", "parameters", "steps", "seconds")
    summary = {
        "setting": f"model.{sweep.setting}",
        "min_gain": sweep.min_gain,
        "rows": len(trials[0].nll),
        "trials": [
            {name: getattr(trial, name) for name in names}
            | {"val_loss": trial.loss, "gain": None if gain is None else plain_interval(gain)}
            for trial, gain in zip(trials, find_gains(sweep, trials), strict=True)
        ],
        "gain_is_over": _compared_with(sweep),
        "chosen": chosen.value,
        "why": why,
    }
    write_output(folder / "sweep.json", summary)
    config = load_yaml((folder / chosen.folder / CONFIG).read_text(encoding="utf-8"))
    config["trainer"]["default_root_dir"] = str(run_folder)
    write_output(folder / "chosen.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    write_output(folder / "sweep.png", _draw(sweep, trials, chosen))
    return summary


def _draw(sweep: Sweep, trials: Sequence[Trial], chosen: Trial) -> bytes:
    """Draw losses as points, and the intervals of their differences as bars around them."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes, blue = figure.subplots(), "#2a6fb0"
    axes.plot(range(len(trials)), [trial.loss for trial in trials], color="#888888", linewidth=1)
    for place, (trial, gain) in enumerate(zip(trials, find_gains(sweep, trials), strict=True)):
        reach = None if gain is None else [[max(0.0, gain.high - gain.value)], [max(0.0, gain.value - gain.low)]]
        filled = blue if trial is chosen else "white"
        axes.errorbar(place, trial.loss, yerr=reach, fmt="o", color=blue, markerfacecolor=filled, markersize=8)
    axes.set_xticks(range(len(trials)), [str(trial.value) for trial in trials])
    axes.set_xlabel(sweep.name)
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(f"Filled: chosen. Bars: 95 % interval of the difference from {_compared_with(sweep)}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    picture = io.BytesIO()
    figure.savefig(picture)
    return picture.getvalue()
