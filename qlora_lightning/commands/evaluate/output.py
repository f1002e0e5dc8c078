"""What ``evaluate`` prints and writes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora_lightning.commands.evaluate.options import Options
from qlora_lightning.evaluation.comparison import BASE, Judged, Part, compare, duel, hardest_first
from qlora_lightning.evaluation.judge import Answering, EvaluationRow
from qlora_lightning.evaluation.report import (
    describe_duel,
    differences_table,
    metrics_as_json,
    metrics_table,
    parts_table,
    prediction_lines,
    samples_table,
    show_row,
    summarize,
    write_json,
    write_lines,
)
from qlora_lightning.evaluation.scores import describe_answered, describe_metric
from qlora_lightning.model.batch import join_places
from qlora_lightning.support.errors import UserError


def report(
    rows: Sequence[EvaluationRow],
    judged: Judged,
    answering: Answering | None,
    sources: Sequence[str],
    adapters: Mapping[str, Path],
    options: Options,
) -> None:
    """Print the tables, and write the files that were asked for.

    Args:
        rows: That were judged.
        judged: What base and adapters made of them.
        answering: How they were answered.
        sources: Names of the split's sources.
        adapters: Folder of each adapter.
        options: Of the command.
    """
    scores = answering.scores if answering else []
    first = next(iter(scores), None)
    measured = compare(judged, scores)
    duels = {name: duel(judged[BASE], judged[name], first) for name in adapters}
    hardest = hardest_first(judged[next(iter(adapters))], first)
    by_source = _measure_parts(rows, judged, scores, lambda row: _name_source(row, sources))
    by_group = _measure_parts(rows, judged, scores, lambda row: row.group or "") if options.group_by else {}

    console = Console(highlight=False)
    answered = {place for place, each in enumerate(judged[BASE]) if each.answer is not None}
    some = describe_answered(len(answered), len(rows))
    console.print(metrics_table(measured, f"{len(rows):,} rows of {options.split}{some}, with 95 % intervals"))
    if len(adapters) > 1:
        console.print(differences_table(measured))
    if answering is not None:
        for note in (answering.mixture, _describe_cut(judged, answering.max_new_tokens)):
            if note is not None:
                console.print(note, markup=False)
    for name, found in duels.items():
        console.print(describe_duel(found, name if len(adapters) > 1 else "the adapter"), markup=False)
        for words, places in (("better", found.wins), ("worse", found.losses)):
            if places:
                console.print(f"  {words}: {join_places([rows[place].place for place in places])}", markup=False)
    shown = ["loss", *scores[:1]]
    if len(by_source) > 1:
        console.print(parts_table(by_source, "By data set", shown))
    if by_group:
        console.print(parts_table(by_group, f"By {options.group_by}", shown))
    if answering is not None and first is not None:
        name = next(iter(adapters))
        wrong = [place for place in hardest if place in answered and judged[name][place].scores[first] < 1]
        for place in wrong[: options.show]:
            shown_row = show_row(rows[place], judged, place, answering)
            console.print(samples_table(shown_row, f"Hard for {name}: {rows[place].place}"))
        if not wrong:
            console.print(f"By {describe_metric(first)}, {name} has all {len(answered):,} answers right.", markup=False)

    summary = summarize(rows, judged, measured, answering, duels, samples=options.show or 0)
    summary |= {"split": options.split, "adapters": {name: str(folder) for name, folder in adapters.items()}}
    summary |= {"hardest": [rows[place].number for place in hardest]}
    summary |= {"sources": _as_json(by_source), "groups": _as_json(by_group)}
    try:
        _write(rows, judged, hardest, answering, sources, summary, options, console)
    except OSError as error:
        raise UserError(f"{error.filename or 'The results'} cannot be written: {error.strerror or error}.") from error


def _describe_cut(judged: Judged, limit: int) -> str | None:
    """Say how many answers had not stopped when they were cut; ``None`` where all had."""
    parts = []
    for name, judgements in judged.items():
        stopped = [each.stopped for each in judgements if each.answer is not None]
        if not all(stopped):
            parts.append(f"{stopped.count(False):,} of {len(stopped):,} of {'the base' if name == BASE else name}")
    if not parts:
        return None
    return f"Answers are cut at {limit:,} tokens (--max-new-tokens): {', '.join(parts)} had not stopped by then."


def _write(
    rows: Sequence[EvaluationRow],
    judged: Judged,
    hardest: Sequence[int],
    answering: Answering | None,
    sources: Sequence[str],
    summary: Mapping[str, Any],
    options: Options,
    console: Console,
) -> None:
    if options.json is not None:
        write_json(summary, options.json)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        figures, predictions = options.files()
        write_lines(prediction_lines(rows, judged, hardest, answering, sources), predictions)
        write_json(summary, figures)
        console.print(f"Written: {figures}, {predictions}", markup=False, soft_wrap=True)


def _measure_parts(
    rows: Sequence[EvaluationRow], judged: Judged, scores: Sequence[str], name_of: Callable[[EvaluationRow], str]
) -> dict[str, Part]:
    parts: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        parts.setdefault(name_of(row), []).append(place)
    found = {}
    for name, places in parts.items():
        own = {side: [judgements[place] for place in places] for side, judgements in judged.items()}
        answered = sum(each.answer is not None for each in own[BASE])
        found[name] = Part(len(places), answered, compare(own, scores))
    return found


def _name_source(row: EvaluationRow, sources: Sequence[str]) -> str:
    return sources[row.source] if row.source < len(sources) else str(row.source)


def _as_json(parts: Mapping[str, Part]) -> dict[str, Any]:
    return {
        name: {"rows": part.rows, "answered_rows": part.answered, "metrics": metrics_as_json(part.measured)}
        for name, part in parts.items()
    }
