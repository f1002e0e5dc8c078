"""What was measured of a run: base against adapters, and the figures by which runs are compared."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_lightning.evaluation.comparison import Interval
from qlora_lightning.evaluation.report import choose_digits, format_interval
from qlora_lightning.evaluation.scores import describe_answered, describe_metric
from qlora_lightning.report.run import Points, Run
from qlora_lightning.support.versions import PEAK_NAMES

BASE, ADAPTER = "base", "adapter"
_DIFFERENCES = ("difference", "differences")
_NO_SCORES = ("loss", "perplexity", "token_accuracy", "stop_rate", "answer_tokens")
_NO_SHARES = ("loss", "perplexity", "answer_tokens")
_PEAKS = (*PEAK_NAMES.values(), "private_memory_gib")
_COSTS = {
    "train_loss": "training loss, last",
    "tokens_per_second": "tokens/s",
    "peak_memory_gib": "peak memory",
    "minutes": "wall time",
    "steps": "steps",
    "tokens": "tokens",
}
_LONGEST = 1_200  # characters shown of an answer: a model that does not stop would fill the page


class Answer(NamedTuple):
    """What one side answered, and whether it is an adapter's and what was expected."""

    side: str
    text: str
    is_right: bool


class Sample(NamedTuple):
    """A row that was answered by base and adapters."""

    prompt: str
    expected: str
    answers: list[Answer]


def is_of_test(run: Run) -> bool:
    """Whether the test rows were evaluated, and not the validation rows."""
    return run.evaluation.get("split") == "test"


def is_of_fit(run: Run) -> bool:
    """Whether the fit itself evaluated all its validation rows, and not `evaluate` some rows later."""
    return not is_of_test(run) and not run.evaluation.get("adapters")


def is_of_run(run: Run) -> bool:
    """Whether the run's own adapter was among those evaluated."""
    return _own_adapter(run) is not None


def describe_rows(run: Run) -> str:
    """Describe which rows were evaluated, and how many."""
    rows, answered = run.evaluation.get("rows"), run.evaluation.get("answered_rows")
    split = "test" if is_of_test(run) else "validation"
    return f"{rows:,} {split} rows{describe_answered(answered or 0, rows)}" if rows else f"{split} rows"


def score_names(run: Run) -> list[str]:
    """Name the scores of answers that were measured, the most important one first."""
    metrics = _metrics(run)
    first = [name for name in run.evaluation.get("scores") or [] if name in metrics]
    return list(dict.fromkeys([*first, *(name for name in metrics if name not in _NO_SCORES)]))


def adapter_names(run: Run) -> list[str]:
    """Name the adapters that were evaluated, the run's own first."""
    names = dict.fromkeys(side for sides in _metrics(run).values() for side in sides)
    adapters = [name for name in names if name not in (BASE, *_DIFFERENCES)] or [ADAPTER]
    return sorted(adapters, key=lambda name: name != _own_adapter(run))


def measured(run: Run, metric: str, side: str) -> float | None:
    """Return a metric of ``base``, of the ``adapter`` that belongs to the run, or of their ``difference``."""
    found = _metrics(run).get(metric, {}).get(adapter_names(run)[0] if side == ADAPTER else side)
    value = found.get("value") if isinstance(found, Mapping) else found
    return None if value is None else float(value)


def difference(run: Run, metric: str) -> Interval | None:
    """Return how much the run's adapter differs from the base, with its interval (NaN if none is known)."""
    sides = _metrics(run).get(metric, {})
    found = (sides.get("differences") or {}).get(adapter_names(run)[0]) or sides.get("difference")
    return _interval(found)


def find_results(run: Run) -> dict[str, float | None]:
    """Return every figure by name; ``None`` if the folder does not hold it.

    Figures of `evaluate` have a prefix: ``test_`` on test rows, ``evaluated_`` on validation rows. They are left out
    if the run's own adapter was not among those evaluated.
    """
    progress, metrics = run.manifest.get("progress") or {}, run.metrics
    own, prefix = is_of_run(run), _prefix(run)
    loss, accuracy = (measured(run, name, ADAPTER) if own else None for name in ("loss", "token_accuracy"))
    speeds = [value for _, value in metrics.get("tokens_per_second", [])]
    seconds = progress.get("seconds")
    return {
        "val_loss": _first(None if prefix else loss, min(_values(metrics, "val_loss"), default=None)),
        "test_loss": None,
        **({f"{prefix}loss": loss} if prefix else {}),
        **{f"{prefix}{score}": measured(run, score, ADAPTER) for score in score_names(run) if own},
        "token_accuracy": _first(
            None if prefix else accuracy, max(_values(metrics, "val_token_accuracy"), default=None)
        ),
        **({f"{prefix}token_accuracy": accuracy} if prefix else {}),
        "train_loss": next(reversed(_values(metrics, "train_loss")), None),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "peak_memory_gib": _peak(run),
        "minutes": None if seconds is None else seconds / 60,
        "steps": _first(progress.get("steps"), max((p[-1][0] for p in metrics.values() if p), default=None)),
        "tokens": _first(progress.get("tokens"), max(_values(metrics, "tokens_seen"), default=None)),
    }


def main_score(run: Run) -> str | None:
    """Name the most important score, as in :func:`find_results`; ``None`` if none was measured."""
    scores = score_names(run) if is_of_run(run) else []
    return f"{_prefix(run)}{scores[0]}" if scores else None


def describe_result(name: str) -> str:
    """Describe a figure of :func:`find_results`."""
    for prefix, rows in (("val_", "validation "), ("test_", "test "), ("evaluated_", "")):
        if name == f"{prefix}loss":
            return f"{rows}loss{'' if rows else ', by evaluate'}"
    rest = name.removeprefix("test_").removeprefix("evaluated_")
    where = ", test rows" if name.startswith("test_") else ", by evaluate" if rest != name else ""
    return _COSTS.get(name) or f"{describe_metric(rest)}{where}"


def write_result(name: str, value: float | None, largest: float | None = None) -> str:
    """Write a figure for people, times in the unit that suits the ``largest`` beside it; a dash if it is not known."""
    if value is None:
        return "–"
    if name.endswith("loss"):
        return f"{value:.4f}"
    if name == "peak_memory_gib":
        return f"{value:.2f} GiB"
    if name == "minutes":
        return write_seconds(60 * value, 60 * (largest or value))
    return f"{value:,.0f}" if name in _COSTS else f"{value:.1%}"


def write_seconds(seconds: float, largest: float | None = None) -> str:
    """Write a duration, ``42 s``, ``4.1 min`` or ``3.5 h``, in the unit that suits the ``largest`` beside it."""
    largest = seconds if largest is None else largest
    if largest < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if largest < 6000 else f"{seconds / 3600:.1f} h"


def result_table(runs: Sequence[Run]) -> list[tuple[str, str, list[tuple[str, bool]]]]:
    """Return each known figure: its name, what it is, and for each run how it is written and whether it is the best.

    Only losses, scores and accuracies have a best, and only if the runs that have them were measured on the same rows.
    """
    found = [find_results(run) for run in runs]
    names = sorted(dict.fromkeys(name for results in found for name in results), key=_order)
    table = []
    for name in names:
        values = [results.get(name) for results in found]
        known = [value for value in values if value is not None]
        if not known:
            continue
        best = None
        if name not in _COSTS and len(set(known)) > 1 and _share_rows(runs, name):
            best = min(known) if name.endswith("loss") else max(known)
        cells = [(write_result(name, value, max(known)), value is not None and value == best) for value in values]
        table.append((name, describe_result(name), cells))
    return table


def metric_rows(run: Run) -> tuple[list[str], list[tuple[str, list[tuple[str, str]]]]]:
    """Return the columns (base, each adapter and its difference), and (value, interval) of each metric in them."""
    names = adapter_names(run)
    headings = [BASE]
    for name in names:
        headings += [name, "difference" if len(names) == 1 else f"{name} − base"]
    rows = []
    for metric, sides in _metrics(run).items():
        cells: list[tuple[Interval | None, str]] = [(_interval(sides.get(BASE)), "")]
        for name in names:
            several = sides.get("differences") or {}
            cells += [(_interval(sides.get(name)), ""), (_interval(several.get(name) or sides.get("difference")), "+")]
        intervals = [interval for interval, _ in cells if interval is not None]
        digits = choose_digits(intervals)
        rows.append((describe_metric(metric), [_write(*cell, metric not in _NO_SHARES, digits) for cell in cells]))
    return headings, rows


def find_samples(run: Run) -> list[Sample]:
    """Return the rows with the answers of all sides that gave one."""
    samples = []
    for row in run.evaluation.get("samples") or []:
        expected = row.get("expected")
        sides = {name: str(row[name]).strip() for name in (BASE, *adapter_names(run)) if row.get(name) is not None}
        answers = [
            Answer(name, _shorten(text), expected is not None and name != BASE and text == str(expected).strip())
            for name, text in sides.items()
        ]
        samples.append(Sample(_shorten(row.get("prompt")), _shorten(expected), answers))
    return samples


def _metrics(run: Run) -> dict[str, Mapping[str, Any]]:
    return dict(run.evaluation.get("metrics") or {})


def _own_adapter(run: Run) -> str | None:
    """Name the run's own adapter among those that were evaluated; ``None`` if it is not among them."""
    folders = run.evaluation.get("adapters")
    if not folders:
        return ADAPTER
    own = (run.folder / "adapter").resolve().parts[-2:]  # `evaluate` may have been started in another folder
    return next((name for name, folder in folders.items() if Path(folder).absolute().parts[-2:] == own), None)


def _prefix(run: Run) -> str:
    return "test_" if is_of_test(run) else "" if is_of_fit(run) else "evaluated_"


def _order(name: str) -> int:
    return 3 if name in _COSTS else 0 if name.endswith("loss") else 2 if name.endswith("token_accuracy") else 1


def _share_rows(runs: Sequence[Run], name: str) -> bool:
    """Whether a figure of all runs that have it was measured on the same rows, as far as their manifests say."""
    rows = set()
    for run in runs:
        if find_results(run).get(name) is not None:
            data = run.manifest.get("data") or {}
            hashes = data.get("hashes") or {}
            split = (run.config.get("data") or {}).get("test") if name.startswith("test_") else hashes.get("val")
            counts = [run.evaluation.get(key) for key in ("rows", "answered_rows")]
            rows.add(repr((split, hashes.get("tokenizer"), counts)) if split else f"unknown of {run.name}")
    return len(rows) == 1


def _peak(run: Run) -> float | None:
    written = run.manifest.get("peak_memory_gib") or {}
    return next(
        (gib for name in _PEAKS if (gib := _first(written.get(name), max(_values(run.metrics, name), default=None)))),
        None,
    )


def _values(metrics: Mapping[str, Points], name: str) -> list[float]:
    return [value for _, value in metrics.get(name, [])]


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _interval(found: Any) -> Interval | None:
    """Read a metric of one side: ``{value, low, high}``, or its value alone."""
    parts = found if isinstance(found, Mapping) else {"value": found}
    if parts.get("value") is None:
        return None
    value, low, high = (float("nan") if parts.get(key) is None else float(parts[key]) for key in Interval._fields)
    return Interval(value, low, high)


def _write(interval: Interval | None, sign: str, share: bool, digits: int) -> tuple[str, str]:
    if interval is None:
        return "–", ""
    value, _, reach = format_interval(interval, share, sign, digits).replace("-", "−").partition(" [")
    return value, reach.removesuffix("]").replace(", ", " to ")


def _shorten(text: Any) -> str:
    if text is None:
        return "–"
    words = str(text).strip() or "(empty)"
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]} …"
