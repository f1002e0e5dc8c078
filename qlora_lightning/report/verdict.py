"""Base against adapters: the table of metrics, and answers of all."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlora_lightning.evaluation.names import describe_metric
from qlora_lightning.report.judged import BASE, adapter_names, metrics_of
from qlora_lightning.report.run import Run
from qlora_lightning.report.ticks import write_number

_LONGEST = 1_200  # characters shown of an answer: a model that does not stop would fill the page


class Column(NamedTuple):
    """A column of the table: a side, or how much an adapter differs from the base."""

    heading: str
    side: str
    is_difference: bool = False


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


def columns_of(run: Run) -> list[Column]:
    """Give the columns of the table: the base, and each adapter with its difference."""
    names = adapter_names(run)
    columns = [Column(BASE, BASE)]
    for name in names:
        columns += [Column(name, name), Column("difference" if len(names) == 1 else f"{name} − base", name, True)]
    return columns


def metric_rows(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Give each metric's name with (value, interval) for each of the columns, as far as known."""
    rows = []
    for name, sides in metrics_of(run).items():
        share = _is_share(name, [_cell(sides.get(side)) for side in (BASE, *adapter_names(run))])
        cells = [(_cell(_find(sides, column)), column.is_difference) for column in columns_of(run)]
        rows.append((describe_metric(name), [_write(*cell, share, signed) for cell, signed in cells]))
    return rows


def samples_of(run: Run) -> list[Sample]:
    """Give the answers of all sides that gave one."""
    return [_sample(found, adapter_names(run)) for found in run.evaluation.get("samples") or []]


def _sample(found: Mapping[str, Any], adapters: Sequence[str]) -> Sample:
    expected = found.get("expected")
    right = None if expected is None else str(expected).strip()
    sides = {name: str(found[name]).strip() for name in (BASE, *adapters) if found.get(name) is not None}
    answers = [Answer(name, _shorten(text), name != BASE and text == right) for name, text in sides.items()]
    return Sample(_shorten(found.get("prompt")), _shorten(expected), answers)


def _find(sides: Mapping[str, Any], column: Column) -> Any:
    if not column.is_difference:
        return sides.get(column.side)
    several = sides.get("differences")
    return several.get(column.side) if isinstance(several, Mapping) else sides.get("difference")


_Cell = tuple[float | None, tuple[float, float] | None]


def _cell(found: Any) -> _Cell:
    if not isinstance(found, Mapping):
        return (found if isinstance(found, int | float) else None), None
    low, high = found.get("low"), found.get("high")
    return found.get("value"), (None if low is None or high is None else (low, high))


def _is_share(name: str, cells: Sequence[_Cell]) -> bool:
    """Whether a metric is read as a percentage: it lies between 0 and 1, and is no loss."""
    if name in ("loss", "perplexity"):
        return False
    values = [value for value, _ in cells if value is not None]
    return bool(values) and all(0 <= value <= 1 for value in values)


def _write(value: float | None, interval: tuple[float, float] | None, share: bool, signed: bool) -> tuple[str, str]:
    def word(number: float) -> str:
        text = f"{number:.1%}" if share else write_number(float(f"{number:.4g}"))
        return f"+{text}" if signed and number > 0 else text.replace("-", "−")

    if value is None:
        return "–", ""
    return word(value), "" if interval is None else f"{word(interval[0])} to {word(interval[1])}"


def _shorten(text: Any) -> str:
    if text is None:
        return "–"
    words = str(text).strip() or "(empty)"  # as in the terminal
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]} …"
