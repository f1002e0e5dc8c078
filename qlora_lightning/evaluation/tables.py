"""A comparison as tables for the terminal."""

import math
from collections.abc import Mapping, Sequence

import rich
from rich.markup import escape
from rich.table import Table

from qlora_lightning.evaluation.bootstrap import Interval
from qlora_lightning.evaluation.comparison import BASE, Duel, Measured, Part
from qlora_lightning.evaluation.names import describe_metric
from qlora_lightning.page.visible import show_controls


def metrics_table(measured: Mapping[str, Measured], title: str, width: int | None = None) -> Table:
    """Show each metric of base and adapters with its interval; with one adapter also their difference.

    Args:
        measured: By metric.
        title: Over the table.
        width: Of the terminal, in characters; ``None``: asked for. In a narrow one intervals stand below their values.
    """
    sides = list(next(iter(measured.values())).sides)
    one = len(sides) == 2
    rows = []
    for name, metric in measured.items():
        digits = choose_digits([*metric.sides.values(), *metric.differences.values()])
        cells = [format_interval(metric.sides[side], metric.percent, digits=digits) for side in sides]
        if one:
            cells.append(format_interval(metric.differences[sides[1]], metric.percent, sign="+", digits=digits))
        rows.append([describe_metric(name), *cells])
    return _figures_table(title, [*sides, *(["difference"] if one else [])], rows, width)


def differences_table(measured: Mapping[str, Measured], width: int | None = None) -> Table:
    """Show the difference of each of several adapters from the base; ``width`` as of :func:`metrics_table`."""
    sides = [side for side in next(iter(measured.values())).sides if side != BASE]
    rows = []
    for name, metric in measured.items():
        digits = choose_digits([*metric.sides.values(), *metric.differences.values()])
        cells = (format_interval(metric.differences[side], metric.percent, "+", digits) for side in sides)
        rows.append([describe_metric(name), *cells])
    return _figures_table("Differences from the base, on the same rows", sides, rows, width)


def _figures_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for heading in ("", *headings):
        table.add_column(escape(heading), justify="right" if heading else "left")
    lines = [["", *headings], *rows]
    needed = sum(3 + max(len(line[column]) for line in lines) for column in range(len(headings) + 1)) + 1
    fits = needed <= (rich.get_console().width if width is None else width)
    for name, *cells in rows:
        table.add_row(name, *(escape(cell if fits else cell.replace(" [", "\n[")) for cell in cells))
    return table


def parts_table(parts: Mapping[str, Part], title: str, metrics: Sequence[str]) -> Table:
    """Show some metrics of parts of the rows: data sets, or groups.

    Args:
        parts: By name.
        title: Over the table.
        metrics: Names of those to show.
    """
    sides = list(next(iter(next(iter(parts.values())).measured.values())).sides)
    some_answered = any(part.answered > 0 for part in parts.values())
    all_answered = all(part.answered == part.rows for part in parts.values())
    shows_answered = some_answered and not all_answered  # whose number the scores' intervals go by
    table = Table(title=escape(title), title_justify="left")
    table.add_column("", overflow="fold")
    table.add_column("rows", justify="right")
    if shows_answered:
        table.add_column("answered", justify="right")
    for name in metrics:
        for side in sides:
            table.add_column(f"{describe_metric(name)}, {escape(side)}", justify="right")
    for part, (rows, answered, measured) in parts.items():
        cells = [f"{answered:,}"] if shows_answered else []
        for name in metrics:
            metric = measured.get(name)
            digits = choose_digits([*metric.sides.values(), *metric.differences.values()]) if metric else 0
            for side in sides:
                cells.append(format_interval(metric.sides[side], metric.percent, digits=digits) if metric else "–")
        table.add_row(escape(part), f"{rows:,}", *cells)
    return table


def describe_duel(duel: Duel, adapter: str = "the adapter") -> str:
    """Say who was better how often."""
    words = "lower loss" if duel.score == "loss" else describe_metric(duel.score)
    return (
        f"By {words}, {adapter} is better on {len(duel.wins):,} rows, the base on {len(duel.losses):,}; "
        f"{duel.ties:,} alike."
    )


def samples_table(entries: Mapping[str, str], title: str = "") -> Table:
    """Show a row: what was asked, what was expected, and what each side answered."""
    table = Table(show_header=False, expand=True, title=escape(title) or None, title_justify="left")
    table.add_column(style="dim", no_wrap=True, width=max(8, *(len(name) for name in entries)))
    table.add_column(overflow="fold")
    for name, text in entries.items():
        table.add_row(escape(name), escape(_shorten(show_controls(text))))
    return table


def choose_digits(intervals: Sequence[Interval]) -> int:
    """Give the decimals that show the smallest of some values, differences among them, of what is no share."""
    sizes = [abs(interval.value) for interval in intervals if interval.value and math.isfinite(interval.value)]
    smallest = min(sizes, default=1.0)
    return 1 if smallest >= 10 else 3 if smallest >= 0.1 else 4


def format_interval(interval: Interval, percent: bool, sign: str = "", digits: int | None = None) -> str:
    """Write ``98.0 % [93.0, 99.4]``, or ``2.098 [2.010, 2.201]`` of what is no share; a difference with its sign.

    Args:
        interval: To write.
        percent: Whether it is a share, which always has one decimal.
        sign: ``+`` for a difference.
        digits: Decimals of what is no share; ``None``: those that show the value.
    """
    if math.isnan(interval.value):
        return "–"
    factor = 100 if percent else 1
    digits = 1 if percent else choose_digits([interval]) if digits is None else digits
    value, low, high = (round(part * factor, digits) + 0.0 for part in interval)  # + 0.0: no -0.0
    unit = " %" if percent and not sign else ""
    reach = "" if math.isnan(low) else f" [{low:,.{digits}f}, {high:,.{digits}f}]"
    return f"{value:{sign},.{digits}f}{unit}{reach}"


def _shorten(text: str, most: int = 300) -> str:
    """Cut what a model that does not stop would fill the screen with."""
    text = text.strip() or "(empty)"
    return text if len(text) <= most else f"{text[:most]} …"
