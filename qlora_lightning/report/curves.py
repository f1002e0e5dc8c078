"""Which charts a run has, and which several runs have together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qlora_lightning.evaluation.names import describe_metric
from qlora_lightning.report.chart import Chart
from qlora_lightning.report.judged import is_of_fit, judged
from qlora_lightning.report.metrics import LARGEST, Points
from qlora_lightning.report.run import Run
from qlora_lightning.report.series import Series, running_mean, smoothing_width
from qlora_lightning.report.settings import flatten

_GIB = 1024**3
_MEMORY = {  # column: its name in a legend
    "memory_peak_gib": "peak",
    "memory_allocated_gib": "allocated",
    "memory_reserved_gib": "reserved",
    "peak_rss_gib": "peak RSS",
    "private_memory_gib": "private",
}
_DRAWN = ("train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second", *_MEMORY)
_UNDRAWN = ("epoch", "val_perplexity", "labelled_tokens_per_second", "tokens_seen", "skipped_steps")
_UNLIKE = 1.05  # tokens per step that differ by more: steps of one run are then not those of another


def charts_of(run: Run) -> list[Chart]:
    """Give the charts of one run; a chart without points is left out when it is drawn."""
    metrics = run.metrics
    return [
        Chart("Loss", "nats per labelled token", _losses(run), from_zero=False),
        Chart("Learning rate", "", [Series("learning rate", metrics.get("learning_rate", []))]),
        Chart("Gradient norm", "before clipping", _norms(run), from_zero=False),
        Chart("Speed", "tokens/s", [*_smoothed("tokens/s", metrics.get("tokens_per_second", []))]),
        Chart("Memory", "GiB", _memory(run)),
        *(_other_chart(name, [_validation(name, metrics[name])]) for name in _others([run])),
    ]


def charts_of_all(runs: Sequence[Run]) -> list[Chart]:
    """Give the charts of several runs, a curve a run; over tokens where their steps are of different sizes."""
    by_tokens = _steps_differ(runs)
    label = "tokens trained on" if by_tokens else "optimizer steps"

    def curves(name: str, smooth: bool = False, style: str = "line") -> list[Series]:
        return [
            Series(run.name, _over(run, _smooth(points) if smooth else points, by_tokens), style, number)
            for number, run in enumerate(runs)
            if (points := run.metrics.get(name, []))
        ]

    peak = next((name for name in _MEMORY if any(run.metrics.get(name) for run in runs)), "")
    return [
        Chart("Validation loss", "nats per labelled token", curves("val_loss", style="dots"), label, from_zero=False),
        Chart("Training loss", "nats per labelled token, smoothed", curves("train_loss", True), label, from_zero=False),
        Chart("Learning rate", "", curves("learning_rate"), label),
        Chart("Gradient norm", "before clipping, smoothed", curves("grad_norm", True), label, from_zero=False),
        Chart("Speed", "tokens/s, smoothed", curves("tokens_per_second", True), label),
        Chart("Memory", f"GiB, {_MEMORY.get(peak, '')}", curves(peak), label),
        *(_other_chart(name, curves(name, style="dots"), label) for name in _others(runs)),
    ]


def _losses(run: Run) -> list[Series]:
    curves = [*_smoothed("training", run.metrics.get("train_loss", []))]
    base = judged(run, "loss", "base") if is_of_fit(run) else None
    if curves and base is not None and 0 < base <= LARGEST:
        curves.append(Series("base, validation", [(0, base)], "limit", 3))
    return [*curves, Series("validation", run.metrics.get("val_loss", []), "dots", 1)]


def _norms(run: Run) -> list[Series]:
    points, clip = run.metrics.get("grad_norm", []), flatten(run.config).get("trainer.gradient_clip_val")
    curves = [*_smoothed("gradient norm", points)]
    if isinstance(clip, int | float) and any(value > clip > 0 for _, value in points):
        curves.append(Series(f"clipped to {clip:g}", [(0, clip)], "limit", 3))
    return curves


def _memory(run: Run) -> list[Series]:
    drawn = [(label, points) for name, label in _MEMORY.items() if (points := run.metrics.get(name))]
    curves = [Series(label, points, colour=number) for number, (label, points) in enumerate(drawn)]
    predicted: Mapping[str, Any] = run.plan.get("predicted") or {}
    size = predicted.get("peak_bytes")
    if curves and isinstance(size, int | float) and abs(size) <= LARGEST:
        curves.append(Series("peak as predicted", [(0, size / _GIB)], "limit", 3))
    return curves


def _smoothed(label: str, points: Points) -> Iterator[Series]:
    """Give the values faintly, and their running mean before them; short curves as they are."""
    width = smoothing_width(len(points))
    if width == 1:
        yield Series(label, points)
        return
    yield Series(label, points, "faint")
    yield Series(f"{label}, mean of {width} steps", running_mean(points, width))


def _smooth(points: Points) -> Points:
    return running_mean(points, smoothing_width(len(points)))


def _other_chart(name: str, curves: Sequence[Series], label: str = "optimizer steps") -> Chart:
    """Draw a metric that has no chart of its own kind: mostly a score, which is a share."""
    are_shares = all(0 <= value <= 1 for series in curves for _, value in series.points)
    return Chart(_heading(name), "", curves, label, from_zero=False, are_shares=are_shares)


def _validation(name: str, points: Points) -> Series:
    return Series(_heading(name), points, "dots" if name.startswith("val_") else "line", 1)


def _others(runs: Iterable[Run]) -> list[str]:
    """Name the columns that have no chart of their own: further metrics of validations, and what users log."""
    names = dict.fromkeys(name for run in runs for name, points in run.metrics.items() if points)
    return [name for name in names if name not in (*_DRAWN, *_UNDRAWN)]


def _heading(name: str) -> str:
    words = describe_metric(name.removeprefix("val_"))
    text = f"{words}, validation" if name.startswith("val_") else words
    return text[:1].upper() + text[1:]


def _steps_differ(runs: Sequence[Run]) -> bool:
    seen = [points[-1] for run in runs if (points := run.metrics.get("tokens_seen"))]
    sizes = [tokens / step for step, tokens in seen if step and tokens]
    return len(sizes) == len(runs) and max(sizes) > _UNLIKE * min(sizes)


def _over(run: Run, points: Points, by_tokens: bool) -> Points:
    """Put the tokens seen until then in the place of each step."""
    if not by_tokens:
        return points
    tokens = dict(run.metrics["tokens_seen"])
    return [(tokens[step], value) for step, value in points if step in tokens]
