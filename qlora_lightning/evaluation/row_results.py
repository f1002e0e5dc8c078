"""Rows to evaluate, and a model's results on them: loss, answer and scores of each."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from qlora_lightning.evaluation import BASE
from qlora_lightning.evaluation.scores import Score, compute_score
from qlora_lightning.model.adapters.inject import with_adapter
from qlora_lightning.model.answers import dense_weights
from qlora_lightning.model.sharded import collective_passes
from qlora_lightning.model.step.accumulate import evaluate
from qlora_lightning.model.step.forward import evaluation_mode
from qlora_lightning.model.step.layout import MicroBatch
from qlora_lightning.model.step.loss import LossSums
from qlora_lightning.model.step.packed import cut_into_rows, is_packed
from qlora_lightning.sources.tensors import IGNORED
from qlora_lightning.support.console import progress_counter

ProgressCounter = Callable[[int], None]
"""Called with the number of losses or answers that are done now."""
RowKind = Literal["answer", "pair", "desirable", "undesirable"]
"""An answer to imitate, a preference pair, or an answer with a label."""
OnAnswers = Callable[[str, Sequence["EvaluationRow"], Sequence["Answer"]], None]
"""Called with a side's name, some rows and their answers, as soon as they are complete."""


@dataclass
class EvaluationRow:
    """One row; prompt and expected answer of a preference pair are those of the chosen answer."""

    number: int  # in its split; -1 for a batch that is not packed
    source: str  # the source of its split: number or name
    prompt: list[int] | None  # token ids before the last answer; None: it is not asked for an answer
    expected: list[int]  # token ids of the last answer, its stop token included
    place: str = ""  # file and line, if they are known
    kind: RowKind = "answer"


class Answer(NamedTuple):
    """What a model answered to a prompt."""

    text: str  # without control tokens and space around it
    tokens: int  # number of tokens
    stopped: bool  # whether it ended with a stop token
    scores: dict[str, float]  # the most important one first

    @property
    def figures(self) -> dict[str, float]:
        """All values that are averaged over answers."""
        return {**self.scores, "stop_rate": float(self.stopped), "answer_tokens": float(self.tokens)}


class RowResult(NamedTuple):
    """Loss and answer of one row; a preference pair counts as one token, correct if the chosen answer is likelier."""

    loss_sum: float  # over its labeled tokens: of compute_loss, by default in nats
    labelled_tokens: float  # a whole number, unless compute_loss weights tokens
    correct: float | None  # labeled tokens of which the label was the most likely token; None: compute_loss has none
    answer: Answer | None = None  # if it was answered
    nll: float | None = None  # negative log-likelihood of its labeled tokens, in nats; None: compute_loss has none

    @property
    def loss(self) -> float:
        """The mean per labeled token; NaN if none is labeled."""
        return self.loss_sum / self.labelled_tokens if self.labelled_tokens else math.nan


@dataclass(frozen=True)
class AnswerSettings:
    """How rows are answered and scored."""

    tokenizer: Any
    stop_ids: list[int]
    scores: Mapping[str, Score]  # by name, the most important one first
    max_new_tokens: int
    batch_size: int  # most rows that are answered together

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without control tokens and space around it."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def score(self, text: str, row: EvaluationRow) -> dict[str, float]:
        """Return the scores of an answer against the expected one of its row."""
        expected = self.decode(row.expected)
        return {name: compute_score(name, score, text, expected) for name, score in self.scores.items()}


def take_batches(loader: Any, limit: float) -> Iterator[Any]:
    """Yield the first batches, up to the Trainer's limit: an int is their number, a float their share."""
    n_batches = limit if isinstance(limit, int) else None if limit == 1 else int(len(loader) * limit)
    return itertools.islice(loader, n_batches)


def unpack_rows(batch: Mapping[str, Any]) -> list[EvaluationRow]:
    """Return the rows of a batch that have a labeled token; a batch that is not packed counts as one row."""
    if not is_packed(batch):
        return [EvaluationRow(-1, "0", None, [])]
    rows = []
    for row in _labelled_rows(batch):
        end = int(row["cu_seqlens"][1])
        prompt, expected = split_sample(row["input_ids"][0, :end].tolist(), row["labels"][0, :end].tolist())
        number = int(row["row_ids"][0]) if "row_ids" in row else -1
        source = int(row["source"][0]) if "source" in row else 0
        kind: RowKind = "pair" if row.get("pairs") else "answer"
        if "desirable" in row:
            kind = "desirable" if bool(row["desirable"][0]) else "undesirable"
        if kind == "undesirable":  # a bad answer is none to expect
            prompt = None
        rows.append(EvaluationRow(number, str(source), prompt, expected, kind=kind))
    return rows


def split_sample(ids: list[int], labels: list[int]) -> tuple[list[int] | None, list[int]]:
    """Return the tokens before the last run of labeled tokens, and that run.

    If all tokens are labeled (``train_on: all``), the end of the prompt is unknown: it is ``None``.
    """
    end = max(index for index, label in enumerate(labels) if label != IGNORED) + 1
    start = next((index + 1 for index in range(end - 1, -1, -1) if labels[index] == IGNORED), 0)
    return (ids[:start] if start > 1 else None), ids[start:end]


def spread(indices: Sequence[int], count: int) -> list[int]:
    """Return ``count`` of the indices, evenly spaced: the first ones may all be of one source."""
    return [indices[n] for n in np.linspace(0, len(indices) - 1, min(count, len(indices)), dtype=int)]


def keep_prompts(rows: Sequence[EvaluationRow], count: int) -> list[EvaluationRow]:
    """Return the rows, of which ``count``, evenly spaced, keep their prompts, to be answered."""
    kept = set(spread([index for index, row in enumerate(rows) if row.prompt is not None], count))
    return [row if index in kept else replace(row, prompt=None) for index, row in enumerate(rows)]


def _labelled_rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in cut_into_rows(batch) if bool((row["labels"] != IGNORED).any())]


def evaluate_sides(
    module: Any,
    batches: Sequence[Mapping[str, Any]],
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings | None,
    adapters: Mapping[str, str],
    show: bool = True,
    on_answers: OnAnswers = lambda side, rows, answers: None,
    next_token: bool = False,
) -> dict[str, list[RowResult]]:
    """Evaluate the base alone, and with each adapter.

    Args:
        module: A :class:`~qlora_lightning.model.module.QLoRAModule`.
        batches: As a loader returns them, on the host.
        rows: Those that :func:`unpack_rows` returns for these batches, to be answered. One without a prompt is skipped.
        settings: How to answer; ``None``: no row is answered.
        adapters: PEFT's names of the adapters, by their names in the results.
        show: Whether a terminal shows a progress bar.
        on_answers: Called as soon as a batch of answers is complete.
        next_token: Whether the loss is that of the next token, whatever the module's ``compute_loss`` does.
    """
    model, results = module.model, {}
    n_losses = sum(len(unpack_rows(batch)) for batch in batches)
    n_answers = sum(row.prompt is not None for row in rows) if settings else 0
    steps = (1 + len(adapters)) * (n_losses + n_answers)
    with progress_counter(f"base and {', '.join(adapters)}", steps, show) as count:
        for side in (BASE, *adapters):
            if side != BASE:
                model.set_adapter(adapters[side])
            disabled = with_adapter(model, None) if side == BASE else nullcontext()
            with disabled, collective_passes(module), dense_weights(model):
                row_results = _evaluate_rows(module, batches, count, next_token)
                answers = answer_rows(module, rows, settings, count, partial(on_answers, side)) if settings else {}
            results[side] = [result._replace(answer=answers.get(index)) for index, result in enumerate(row_results)]
    return results


@torch.no_grad()
def _evaluate_rows(module: Any, batches: Iterable[Any], count: ProgressCounter, next_token: bool) -> list[RowResult]:
    """Compute the loss of every row of some batches with the module as it is; its training mode is restored."""
    results = []
    with evaluation_mode(module):
        for batch in batches:
            for sums in row_losses(module, batch, next_token):
                metrics = {name: float(value) for name, value in sums.metrics.items()}
                correct, nll = metrics.get(module.accuracy), metrics.get("nll")
                results.append(RowResult(float(sums.loss_sum), sums.count.item(), correct, nll=nll))
                count(1)
    return results


def row_losses(module: Any, batch: Mapping[str, Any], next_token: bool = False) -> Iterator[LossSums]:
    """Compute what ``module.compute_loss`` returns for each single row that :func:`unpack_rows` returns for a batch.

    If that is not overridden, rows go through the model together, which is two to three times as fast. An override
    gets one row after the other, for its loss may be of any kind; ``next_token`` asks for the usual one instead.
    """
    if is_packed(batch) and (next_token or not module.overrides("compute_loss")):
        for sums in evaluate(batch, module.cutter, lambda part: _losses_of_samples(module, part)):
            yield from sums
        return
    for row in _labelled_rows(batch) if is_packed(batch) else [batch]:
        row = module.prepare_batch(module.transfer_batch_to_device(row, module.device, 0))
        yield from evaluate(row, module.cutter, module.sum_loss)


def _losses_of_samples(module: Any, micro_batch: MicroBatch) -> list[LossSums]:
    samples = zip(*(values.split(micro_batch.counts) for values in module.token_losses(micro_batch)), strict=True)
    return [LossSums.of(nll, token_accuracy=correct, nll=nll) for nll, correct in samples if len(nll)]


def answer_rows(
    module: Any,
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings,
    watch: ProgressCounter = lambda steps: None,
    on_answers: Callable[[Sequence[EvaluationRow], Sequence[Answer]], None] = lambda rows, answers: None,
) -> dict[int, Answer]:
    """Answer the rows that have a prompt, and score the answers; return them by the rows' indices.

    ``watch`` and ``on_answers`` are called for each batch, as soon as it is complete.
    """
    limit, answers = settings.max_new_tokens, dict[int, Answer]()
    indices = [index for index, row in enumerate(rows) if row.prompt is not None]

    def add(batch: Sequence[int], ids: Sequence[list[int]]) -> None:
        batch_rows = [rows[indices[n]] for n in batch]
        texts = [settings.decode(token_ids) for token_ids in ids]
        batch_answers = [
            Answer(text, len(token_ids), len(token_ids) < limit, settings.score(text, row))
            for text, token_ids, row in zip(texts, ids, batch_rows, strict=True)
        ]
        answers.update(zip((indices[n] for n in batch), batch_answers, strict=True))
        watch(len(batch))
        on_answers(batch_rows, batch_answers)

    prompts = [rows[index].prompt for index in indices]
    module.answer(prompts, settings.stop_ids, limit, batch_size=settings.batch_size, on_batch=add)
    return {index: answers[index] for index in indices}
