"""A comparison as tables for the terminal, and as ``evaluation.json`` and ``predictions.jsonl``."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich
from rich.markup import escape
from rich.table import Table

from qlora_lightning.evaluation.comparison import BASE, METHOD, Duel, Interval, Judged, Measured, Part
from qlora_lightning.evaluation.scores import describe_metric
from qlora_lightning.page import show_controls
from qlora_lightning.support.files import write_whole

if TYPE_CHECKING:  # a report of runs needs no torch
    from qlora_lightning.evaluation.judge import Answering, EvaluationRow

EVALUATION_FILE, PREDICTIONS_FILE = "evaluation.json", "predictions.jsonl"


def metrics_table(measured: Mapping[str, Measured], title: str, width: int | None = None) -> Table:
    """Show each metric of base and adapters with its interval; with one adapter also their difference.

    Args:
        measured: By metric.
        title: Over the table.
        width: Of the terminal, in characters; ``None``: asked for. In a narrow one intervals are below their values.
    """
    base, *adapters = next(iter(measured.values())).sides
    differences = {"difference": adapters[0]} if len(adapters) == 1 else {}
    return _figures_table(measured, title, [base, *adapters], differences, width)


def differences_table(measured: Mapping[str, Measured], width: int | None = None) -> Table:
    """Show the difference of each of several adapters from the base; ``width`` as of :func:`metrics_table`."""
    differences = {side: side for side in next(iter(measured.values())).differences}
    return _figures_table(measured, "Differences from the base, on the same rows", [], differences, width)


def _figures_table(
    measured: Mapping[str, Measured],
    title: str,
    sides: Sequence[str],
    differences: Mapping[str, str],
    width: int | None,
) -> Table:
    lines = [["", *sides, *differences]]
    for name, metric in measured.items():
        digits = choose_digits([*metric.sides.values(), *metric.differences.values()])
        own = [format_interval(metric.sides[side], metric.percent, "", digits) for side in sides]
        gains = [
            format_interval(metric.differences[side], metric.percent, "+", digits) for side in differences.values()
        ]
        lines.append([describe_metric(name), *own, *gains])
    table = Table(title=escape(title), title_justify="left")
    for heading in lines[0]:
        table.add_column(escape(heading), justify="right" if heading else "left")
    needed = sum(3 + max(map(len, column)) for column in zip(*lines, strict=True)) + 1
    fits = needed <= (rich.get_console().width if width is None else width)
    for name, *cells in lines[1:]:
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
    """Describe which side was better how often."""
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
    """Return the decimals that show the smallest of some values, differences among them, of what is no share."""
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


def metrics_as_json(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return each metric's ``{side: {value, low, high}, difference: …}``; of several adapters also ``differences``.

    ``difference`` is the first adapter's.
    """
    found: dict[str, Any] = {}
    for name, metric in measured.items():
        differences = {side: _interval(interval) for side, interval in metric.differences.items()}
        entry = {side: _interval(interval) for side, interval in metric.sides.items()}
        entry["difference"] = next(iter(differences.values()))
        found[name] = entry | ({"differences": differences} if len(differences) > 1 else {})
    return found


def summarize(
    rows: "Sequence[EvaluationRow]",
    judged: Judged,
    measured: Mapping[str, Measured],
    answering: "Answering | None",
    duels: Mapping[str, Duel],
    samples: int,
) -> dict[str, Any]:
    """Return what was found as plain values, with a few rows to look at.

    Args:
        rows: That were judged.
        judged: What base and adapters made of them.
        measured: Their means.
        answering: How rows were answered, if they were.
        duels: Of each adapter with the base.
        samples: How many of the answered rows to show.
    """
    answered = [place for place, judgement in enumerate(judged[BASE]) if judgement.answer is not None]
    return {
        "rows": len(rows),
        "answered_rows": len(answered),
        "labelled_tokens": sum(judgement.labelled_tokens for judgement in judged[BASE]),
        "method": METHOD,
        "max_new_tokens": answering.max_new_tokens if answering else None,
        "scores": answering.scores if answering else [],
        "metrics": metrics_as_json(measured),
        "duels": {
            name: {
                "score": duel.score,
                "wins": [rows[place].number for place in duel.wins],
                "losses": [rows[place].number for place in duel.losses],
                "ties": duel.ties,
            }
            for name, duel in duels.items()
        },
        "samples": [show_row(rows[place], judged, place, answering) for place in answered[:samples] if answering],
    }


def show_row(row: "EvaluationRow", judged: Judged, place: int, answering: "Answering") -> dict[str, str]:
    """Return a row as people read it: ``prompt`` (its last turn), ``expected``, and each side's answer."""
    asked = answering.decode(last_turn(row.prompt or [], answering.stop_ids))
    question = asked.removeprefix("user\n")  # what ChatML and Llama-3 leave of the turn's header
    answers = {side: judgements[place].answer or "" for side, judgements in judged.items()}
    return {"prompt": question, "expected": answering.decode(row.expected), **answers}


def prediction_lines(
    rows: "Sequence[EvaluationRow]",
    judged: Judged,
    order: Sequence[int],
    answering: "Answering | None",
    sources: Sequence[str],
) -> list[dict[str, Any]]:
    """Return a row's place, whole prompt and reference, and each side's answer, scores and loss, in an order of rows.

    A row without a prompt of its own (``train_on: all``) has losses only.
    """
    lines = []
    for place in order:
        row = rows[place]
        line: dict[str, Any] = {
            "row": row.number,
            "place": row.place,
            "source": sources[row.source] if row.source < len(sources) else str(row.source),
            **({} if row.group is None else {"group": row.group}),
        }
        if answering is not None and row.prompt is not None:
            line["prompt"] = answering.tokenizer.decode(row.prompt)
            line["expected"] = answering.decode(row.expected)
        for side, judgements in judged.items():
            judgement = judgements[place]
            loss = judgement.loss if math.isfinite(judgement.loss) else None
            line[side] = {"answer": judgement.answer, "loss": loss, "scores": judgement.scores}
            line[side] |= {"labelled_tokens": judgement.labelled_tokens, "correct_tokens": judgement.correct}
            line[side] |= {"stopped": judgement.stopped, "answer_tokens": judgement.answer_tokens}
        lines.append(line)
    return lines


def write_json(content: Mapping[str, Any], file: Path) -> None:
    """Write a summary, whole or not at all."""
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write a line of JSON for each, whole or not at all."""
    write_whole(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _interval(interval: Interval) -> dict[str, float | None]:
    return {
        name: value if math.isfinite(value) else None for name, value in zip(interval._fields, interval, strict=True)
    }


def last_turn(prompt: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """Return the part of a prompt between its last two stop tokens: the question, without system prompt and header."""
    stops = [place for place, token in enumerate(prompt) if token in stop_ids]
    return list(prompt[(stops[-2] + 1 if len(stops) > 1 else 0) : (stops[-1] if stops else len(prompt))])
