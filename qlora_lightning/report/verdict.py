"""Base against adapter: the table of metrics, and answers of both."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qlora_lightning.report.run import Run
from qlora_lightning.report.ticks import write_number

_SIDES = ("base", "adapter", "difference")
_LONGEST = 1_200  # characters shown of an answer: a model that does not stop would fill the page


class Sample(NamedTuple):
    """A validation row, answered by both."""

    prompt: str
    expected: str
    base: str
    adapter: str

    @property
    def is_right(self) -> bool:
        """Whether the adapter answered what was expected."""
        return self.adapter.strip() == self.expected.strip()


def metric_rows(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Give each metric's heading with (value, interval) of base, adapter and their difference, as far as known."""
    evaluated: Mapping[str, Any] = run.evaluation.get("metrics") or {}
    rows = {name: {side: _cell(found.get(side)) for side in _SIDES} for name, found in evaluated.items()}
    return [
        (
            name.replace("_", " "),
            [_write(*sides[side], _is_share(name, sides), side == "difference") for side in _SIDES],
        )
        for name, sides in rows.items()
    ]


def samples_of(run: Run) -> list[Sample]:
    """Give the answers of both."""
    found = run.evaluation.get("samples") or []
    return [Sample(*(_shorten(sample.get(name)) for name in Sample._fields)) for sample in found]


_Cell = tuple[float | None, tuple[float, float] | None]


def _cell(found: Any) -> _Cell:
    if not isinstance(found, Mapping):
        return (found if isinstance(found, int | float) else None), None
    low, high = found.get("low"), found.get("high")
    return found.get("value"), (None if low is None or high is None else (low, high))


def _is_share(name: str, sides: Mapping[str, _Cell]) -> bool:
    """Whether a metric is read as a percentage: it lies between 0 and 1, and is no loss."""
    if name in ("loss", "perplexity"):
        return False
    values = [value for value, _ in (sides["base"], sides["adapter"]) if value is not None]
    return bool(values) and all(0 <= value <= 1 for value in values)


def _write(value: float | None, interval: tuple[float, float] | None, share: bool, signed: bool) -> tuple[str, str]:
    def word(number: float) -> str:
        text = f"{number:.1%}" if share else write_number(float(f"{number:.4g}"))
        return f"+{text}" if signed and number > 0 else text.replace("-", "−")

    if value is None:
        return "–", ""
    return word(value), "" if interval is None else f"{word(interval[0])} to {word(interval[1])}"


def _shorten(text: Any) -> str:
    words = str(text or "").strip()
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]} …"
