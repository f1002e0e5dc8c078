"""A comparison as plain values: ``evaluation.json``, and a line of ``predictions.jsonl`` per row."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_lightning.evaluation.bootstrap import METHOD, Interval
from qlora_lightning.evaluation.comparison import BASE, Duel, Judged, Measured
from qlora_lightning.evaluation.judge import Answering
from qlora_lightning.evaluation.rows import EvaluationRow, last_turn
from qlora_lightning.support.files import write_whole

EVALUATION_FILE, PREDICTIONS_FILE = "evaluation.json", "predictions.jsonl"


def metrics_as_json(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Give each metric's ``{side: {value, low, high}, difference: …}``; of several adapters also ``differences``.

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
    rows: Sequence[EvaluationRow],
    judged: Judged,
    measured: Mapping[str, Measured],
    answering: Answering | None,
    duels: Mapping[str, Duel],
    samples: int,
) -> dict[str, Any]:
    """Give what was found as plain values, with a few rows to look at.

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


def show_row(row: EvaluationRow, judged: Judged, place: int, answering: Answering) -> dict[str, str]:
    """Give a row as people read it: ``prompt`` (its last turn), ``expected``, and each side's answer."""
    asked = answering.decode(last_turn(row.prompt or [], answering.stop_ids))
    question = asked.removeprefix("user\n")  # what ChatML and Llama-3 leave of the turn's header
    answers = {side: judgements[place].answer or "" for side, judgements in judged.items()}
    return {"prompt": question, "expected": answering.decode(row.expected), **answers}


def prediction_lines(
    rows: Sequence[EvaluationRow],
    judged: Judged,
    order: Sequence[int],
    answering: Answering | None,
    sources: Sequence[str],
) -> list[dict[str, Any]]:
    """Give a row's place, whole prompt and reference, and each side's answer, scores and loss, in an order of rows.

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
