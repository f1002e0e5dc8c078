"""A picture of a sweep: the validation loss of each trial, with the noise of its comparison."""

import io
from collections.abc import Sequence
from pathlib import Path

from qlora_lightning.commands.sweep.dimensions import Dimension, show_value
from qlora_lightning.commands.sweep.report import compared
from qlora_lightning.commands.sweep.trial import Trial
from qlora_lightning.support.files import write_whole


def plot_sweep(file: Path, dimension: Dimension, trials: Sequence[Trial], chosen: Trial) -> None:
    """Draw losses as points, and the 95 % intervals of the differences as bars.

    A bar shows where a trial's loss would lie on other rows, were that of the trial it is compared with as it is.

    Args:
        file: A ``.png``.
        dimension: What was varied.
        trials: In their order.
        chosen: Drawn filled.
    """
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    places, losses = range(len(trials)), [trial.loss for trial in trials]
    axes.plot(places, losses, color="#888888", linewidth=1, zorder=1)
    for place, trial, gain in zip(places, trials, compared(dimension, trials), strict=True):
        if gain is not None:
            other = trial.loss + gain.value
            axes.vlines(place, other - gain.high, other - gain.low, color="#2a6fb0", linewidth=2, zorder=2)
        filled = "#2a6fb0" if trial is chosen else "white"
        axes.plot(place, trial.loss, "o", color="#2a6fb0", markerfacecolor=filled, markersize=8, zorder=3)
    axes.set_xticks(list(places), [show_value(trial.value) for trial in trials])
    axes.set_xlabel(dimension.title)
    axes.set_ylabel("validation loss (nats per token)")
    over = "the one before" if dimension.stops else "the best"
    axes.set_title(f"Filled: chosen. Bars: 95 % interval of the difference from {over}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    picture = io.BytesIO()
    figure.savefig(picture)
    write_whole(file, picture.getvalue())
