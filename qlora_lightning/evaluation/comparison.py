"""Base and adapters side by side: tables for the terminal, ``evaluation.json`` and ``predictions.jsonl``."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.markup import escape
from rich.table import Table

from qlora_lightning.evaluation import BASE, intervals
from qlora_lightning.evaluation.row_results import AnswerSettings, EvaluationRow, RowResult
from qlora_lightning.evaluation.scores import FORGETTING, describe_answered, describe_metric, is_share, shorten_text
from qlora_lightning.support.console import count_of, make_table, say, terminal

Results = Mapping[str, Sequence[RowResult]]
"""By side, the base first: results of the same rows in the same order."""
_MAX_PLACES = 8  # named in a line
_MAX_LENGTH = 300  # characters of a text: a model that does not stop would fill the screen


def sum_by_row(pieces: Iterable[tuple[int, float, float]]) -> list[tuple[float, float]]:
    """Sum numerators and denominators over the pieces of each row, which are not independent draws.

    A piece is its row's number (negative: it is a row by itself), its numerator and its denominator.
    """
    sums: dict[int, tuple[float, float]] = {}
    for index, (number, numerator, denominator) in enumerate(pieces):
        key = number if number >= 0 else -1 - index
        total = sums.get(key, (0.0, 0.0))
        sums[key] = total[0] + numerator, total[1] + denominator
    return list(sums.values())


def compare(results: Results, rows: Sequence[EvaluationRow]) -> dict[str, intervals.Metric]:
    """Compute every metric of every side, by name: losses over all rows, scores over the answered ones."""
    n_by_kind = Counter(row.kind for row in rows)
    # all desirable answers weigh as much as all undesirable ones: it is no gain if every answer is likelier
    weights = [len(rows) / n_by_kind[row.kind] for row in rows]

    def over_rows(name: str, fraction: Callable[[RowResult], tuple[float, float] | None]) -> intervals.Metric:
        """Measure a fraction that all results have, or some of them."""
        sides = {}
        for side, row_results in results.items():
            pieces = []
            for row, result, weight in zip(rows, row_results, weights, strict=True):
                if (parts := fraction(result)) is not None:
                    pieces.append((row.number, weight * parts[0], weight * parts[1]))
            sides[side] = sum_by_row(pieces)
        return intervals.measure(name, sides)

    all_results = [result for row_results in results.values() for result in row_results]
    metrics = {"loss": over_rows("loss", lambda result: (result.loss_sum, result.labelled_tokens))}
    if rows[0].kind == "answer" and all(result.nll is not None for result in all_results):
        metrics["perplexity"] = over_rows("perplexity", lambda result: (result.nll or 0.0, result.labelled_tokens))
    # of answers with a label there is none: a base that is its own reference has a margin of 0 on all of them
    accuracy = {"answer": "token_accuracy", "pair": intervals.PREFERENCE_ACCURACY}.get(rows[0].kind)
    if accuracy is not None and all(result.correct is not None for result in all_results):
        metrics[accuracy] = over_rows(accuracy, lambda result: (result.correct or 0.0, result.labelled_tokens))
    answers = (result.answer for result in all_results if result.answer is not None)
    for name in next((answer.figures for answer in answers), ()):
        metrics[name] = over_rows(name, partial(_read_figure, name))
    return metrics


def _read_figure(name: str, result: RowResult) -> tuple[float, float] | None:
    return None if result.answer is None else (result.answer.figures[name], 1.0)


class Comparison:
    """Base and adapters on the same rows.

    Args:
        rows: The evaluated rows.
        results: Their results, by side.
        settings: How rows were answered; ``None``: they were not.
        forgetting: For each side, nats and tokens of rows that have nothing to do with the task: their loss is another
            metric.
    """

    def __init__(
        self,
        rows: Sequence[EvaluationRow],
        results: Results,
        settings: AnswerSettings | None,
        forgetting: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    ) -> None:
        self.rows, self.results, self.settings = rows, results, settings
        # a template, or a cut, may make several samples of a row
        self.n_rows = len({row.number for row in rows if row.number >= 0}) or len(rows)
        self.metrics = compare(results, rows)
        if forgetting is not None:
            self.metrics[FORGETTING] = intervals.measure(FORGETTING, forgetting)
        self.adapters = [side for side in results if side != BASE]
        # indices of rows
        self.answered = [index for index, result in enumerate(results[BASE]) if result.answer is not None]
        self.score = next(iter(settings.scores)) if settings else None  # the most important one
        by_kind = {"answer": self.score or "loss", "pair": intervals.PREFERENCE_ACCURACY}
        # metric that decides which side wins a row
        self.compared_by = by_kind.get(rows[0].kind, "loss")
        if self.compared_by != self.score:  # a server has only answers, and no loss
            self.adapters = [side for side in self.adapters if any(row.labelled_tokens for row in results[side])]

    def by_source(self) -> "dict[str, Comparison]":
        """Return a comparison for each source of rows."""
        by_source: dict[str, list[int]] = {}
        for index, row in enumerate(self.rows):
            by_source.setdefault(row.source, []).append(index)
        return {
            name: Comparison(
                [self.rows[index] for index in indices],
                {side: [results[index] for index in indices] for side, results in self.results.items()},
                self.settings,
            )
            for name, indices in by_source.items()
        }

    def compare_rows(self, adapter: str) -> tuple[list[int], list[int], int]:
        """Return the indices of rows on which an adapter is better than the base, and worse, and the number of ties.

        Rows are compared by ``compared_by``: a score of the answered ones, or the preference or loss of all.
        """
        indices = self.answered if self.compared_by == self.score else range(len(self.rows))
        gains = {index: self._merit(adapter, index) - self._merit(BASE, index) for index in indices}
        better = [index for index, gain in gains.items() if gain > 0]
        worse = [index for index, gain in gains.items() if gain < 0]
        return better, worse, len(gains) - len(better) - len(worse)

    def _merit(self, side: str, index: int) -> float:
        result = self.results[side][index]
        by_metric = {intervals.PREFERENCE_ACCURACY: float(result.correct or 0.0), "loss": -result.loss}
        return by_metric.get(self.compared_by, self._score(side, index))

    def hardest_first(self) -> list[int]:
        """Return the indices of all rows, the first adapter's lowest score first, then its highest loss."""
        results = self.results[self.adapters[0]]
        indices = range(len(self.rows))
        return sorted(indices, key=lambda index: (self._score(self.adapters[0], index), -results[index].loss))

    def is_wrong(self, index: int) -> bool:
        """Whether a row was answered, and the first adapter's answer has less than the full score."""
        return self._score(self.adapters[0], index) < 1

    def _score(self, side: str, index: int) -> float:
        answer = self.results[side][index].answer
        return answer.scores[self.score] if answer and self.score else 1.0

    # ---- for people ------------------------------------------------------------------------------------------------

    def print(self, noun: str) -> None:
        """Print all metrics, and on which rows each adapter beats the base; ``noun`` is what one is called."""
        self.print_metrics(noun)
        metric = "lower loss" if self.compared_by == "loss" else describe_metric(self.compared_by)
        unit = "sample" if self.n_rows < len(self.rows) else "row"
        for adapter in self.adapters:
            better, worse, ties = self.compare_rows(adapter)
            name = adapter if len(self.adapters) > 1 else "the adapter"
            counts = f"{count_of(len(better), unit)}, the base on {len(worse):,}; {ties:,} alike"
            say(f"By {metric}, {name} is better on {counts}.")
            if self.rows[0].kind in ("desirable", "undesirable"):
                kinds = Counter(self.rows[index].kind for index in better)
                desirable, undesirable = (
                    count_of(kinds[kind], f"{kind} answer") for kind in ("desirable", "undesirable")
                )
                say(f"  better: {desirable}, {undesirable}")
            for outcome, indices in (("better", better), ("worse", worse)):
                places = [*dict.fromkeys(self.rows[index].place for index in indices if self.rows[index].place)]
                if places:
                    say(f"  {outcome}: {', '.join(places[:_MAX_PLACES])}{' …' if len(places) > _MAX_PLACES else ''}")

    def print_metrics(self, noun: str, source: str = "") -> None:
        """Print a table of all metrics with their intervals, below the values in a narrow terminal."""
        limit = f", answers of at most {count_of(self.settings.max_new_tokens, 'token')}" if self.settings else ""
        count = count_of(self.n_rows, noun) + (f" of {source}" if source else "")
        if self.n_rows < len(self.rows):  # turns, or pieces of a long text
            count += f" in {count_of(len(self.rows), 'sample')}"
        count += describe_answered(len(self.answered), len(self.rows))
        gains = ["difference"] if len(self.adapters) == 1 else [f"{adapter} − base" for adapter in self.adapters]
        cells = []
        for name, metric in self.metrics.items():
            digits = intervals.choose_digits([*metric.sides.values(), *metric.differences.values()])
            texts = [
                intervals.format_interval(interval, is_share(name), "", digits) for interval in metric.sides.values()
            ]
            differences = [metric.differences[adapter] for adapter in self.adapters]
            texts += [intervals.format_interval(interval, is_share(name), "+", digits) for interval in differences]
            is_wide = terminal().width >= 100
            cells.append([describe_metric(name), *(text if is_wide else text.replace(" [", "\n[") for text in texts)])
        say(make_table(("", *self.results, *gains), cells, f"{count}{limit}, with 95 % intervals"))

    def print_rows(self, indices: Sequence[int]) -> None:
        """Print answered rows: the prompt, the expected answer, and the answer of each side."""
        for index in indices:
            table = Table(show_header=False, expand=True, title=escape(self.rows[index].place), title_justify="left")
            table.add_column(style="dim", no_wrap=True, min_width=8)
            table.add_column(overflow="fold")
            for name, text in self._show(index).items():
                text = shorten_text(text.strip(), _MAX_LENGTH, from_end=name == "prompt")
                table.add_row(escape(name), escape(text))
            say(table)

    def _show(self, index: int) -> dict[str, str]:
        row, settings = self.rows[index], self.settings
        assert settings is not None
        answers = {side: results[index].answer for side, results in self.results.items()}
        texts = {side: answer.text if answer else "" for side, answer in answers.items()}
        return {"prompt": settings.decode(row.prompt or []), "expected": settings.decode(row.expected), **texts}

    # ---- for programs ----------------------------------------------------------------------------------------------

    def summary(self, samples: int) -> dict[str, Any]:
        """Return all figures as plain values, and the first ``samples`` answered rows."""
        outcomes = {adapter: self.compare_rows(adapter) for adapter in self.adapters}
        return {
            **self.figures(),
            "labelled_tokens": sum(result.labelled_tokens for result in self.results[BASE]),
            "max_new_tokens": self.settings.max_new_tokens if self.settings else None,
            "scores": list(self.settings.scores) if self.settings else [],
            "comparisons": {
                adapter: {
                    "score": self.compared_by,
                    "wins": [self.rows[index].number for index in better],
                    "losses": [self.rows[index].number for index in worse],
                    "ties": ties,
                }
                for adapter, (better, worse, ties) in outcomes.items()
            },
            "samples": [self._show(index) for index in self.answered[:samples]],
        }

    def figures(self) -> dict[str, Any]:
        """Return counts of rows, and each metric's ``{side: {value, low, high}, difference: …}``.

        ``difference`` is the first adapter's; with several adapters ``differences`` has those of all.
        """
        metrics: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            differences = {side: intervals.plain_interval(interval) for side, interval in metric.differences.items()}
            metrics[name] = {side: intervals.plain_interval(interval) for side, interval in metric.sides.items()}
            metrics[name]["difference"] = differences[self.adapters[0]]
            if len(self.adapters) > 1:
                metrics[name]["differences"] = differences
        answered_rows = len({self.rows[index].number for index in self.answered})
        return {"rows": self.n_rows, "answered_rows": answered_rows, "metrics": metrics}

    def predictions(self, order: Sequence[int]) -> list[dict[str, Any]]:
        """Return each row's place, prompt and expected answer, and each side's answer, scores and loss, in ``order``.

        A row without a prompt of its own (``train_on: all``) has losses only.
        """
        lines = []
        for index in order:
            row, settings = self.rows[index], self.settings
            line: dict[str, Any] = {"row": row.number, "place": row.place, "source": row.source}
            if settings is not None and row.prompt is not None:
                line["prompt"] = settings.tokenizer.decode(row.prompt)
                line["expected"] = settings.decode(row.expected)
            for side, results in self.results.items():
                result, answer = results[index], results[index].answer
                line[side] = {
                    "answer": answer.text if answer else None,
                    "loss": result.loss if math.isfinite(result.loss) else None,
                    "scores": answer.scores if answer else {},
                    "labelled_tokens": result.labelled_tokens,
                    "correct_tokens": result.correct,
                    "stopped": answer.stopped if answer else False,
                    "answer_tokens": answer.tokens if answer else 0,
                }
            lines.append(line)
        return lines
