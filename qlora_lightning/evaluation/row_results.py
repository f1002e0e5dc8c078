"""Rows to evaluate, and what a model makes of them: loss, answer and scores of each."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from qlora_lightning.base.tensors import IGNORED
from qlora_lightning.evaluation import BASE
from qlora_lightning.evaluation.scores import SCORES
from qlora_lightning.model.adapters.inject import with_adapter
from qlora_lightning.model.answers import dense_weights
from qlora_lightning.model.sharded import collective_passes
from qlora_lightning.model.step.batch import cut_into_rows, is_flat
from qlora_lightning.model.step.loss import LossSums, head_loss, lm_head_of
from qlora_lightning.support.console import progress_counter

ProgressCounter = Callable[[int], None]
"""Called with the number of losses or answers that are done now."""
OnAnswers = Callable[[str, Sequence["EvaluationRow"], Sequence["Answer"]], None]
"""Called with a side's name, some rows and their answers as soon as these are there."""


@dataclass
class EvaluationRow:
    """One row; of two answers to compare, prompt and expected answer are those of the chosen one."""

    number: int  # in its split; -1 for a batch that is not flat
    source: str  # number of the split's source that it is from, or its name
    prompt: list[int] | None  # token ids before the last answer; None if all tokens are labelled
    expected: list[int]  # token ids of the last answer, its stop token included
    place: str = ""  # file and line, if they are known
    is_preference: bool = False  # whether it is two answers to compare, or one with a verdict
    has_verdict: bool = False


class Answer(NamedTuple):
    """What a model answered to a prompt."""

    text: str  # without control tokens and space around it
    tokens: int  # how many
    stopped: bool  # whether it ended with a stop token
    scores: dict[str, float]  # the one that counts most first

    @property
    def figures(self) -> dict[str, float]:
        """All that is averaged over answers."""
        return {**self.scores, "stop_rate": float(self.stopped), "answer_tokens": float(self.tokens)}


class RowResult(NamedTuple):
    """Loss and answer of one row; two answers to compare count as one token, correct if the chosen is the likelier."""

    nll: float  # sum over its labelled tokens, in nats
    labelled_tokens: int
    correct: int  # labelled tokens of which the label was the most likely token
    answer: Answer | None = None  # if it was answered

    @property
    def loss(self) -> float:
        """Nats per labelled token; NaN if none is labelled."""
        return self.nll / self.labelled_tokens if self.labelled_tokens else math.nan


@dataclass(frozen=True)
class AnswerSettings:
    """How rows are answered and scored."""

    tokenizer: Any
    stop_ids: list[int]
    scores: list[str]  # names, the one that counts most first
    max_new_tokens: int
    batch_size: int  # at most so many rows are answered together

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without control tokens and space around it."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def score(self, text: str, row: EvaluationRow) -> dict[str, float]:
        """Return the scores of an answer beside what the row expects."""
        expected = self.decode(row.expected)
        return {name: SCORES[name](text, expected) for name in self.scores}


def take_batches(loader: Any, limit: float) -> Iterator[Any]:
    """Yield the first batches: as many as the Trainer's limit says, a number or (a float) their share."""
    most = limit if isinstance(limit, int) else None if limit == 1 else int(len(loader) * limit)
    return itertools.islice(loader, most)


def unpack_rows(batch: Mapping[str, Any]) -> list[EvaluationRow]:
    """Return the rows of a batch that have a labelled token; a batch that is not flat counts as one row."""
    if not is_flat(batch):
        return [EvaluationRow(-1, "0", None, [])]
    rows = []
    for row in _labelled_rows(batch):
        end = int(row["cu_seqlens"][1])
        prompt, expected = split_sample(row["input_ids"][0, :end].tolist(), row["labels"][0, :end].tolist())
        number, source = int(row["row_ids"][0]), str(int(row["source"][0]))
        is_judged = "desirable" in row
        if is_judged and not bool(row["desirable"][0]):  # an answer that is not to be given
            prompt = None
        is_preference = is_judged or row.get("pairs", False)
        rows.append(EvaluationRow(number, source, prompt, expected, "", is_preference, is_judged))
    return rows


def split_sample(ids: list[int], labels: list[int]) -> tuple[list[int] | None, list[int]]:
    """Return what is before the last run of labelled tokens, and that run.

    With all tokens labelled (``train_on: all``) nobody knows where the prompt ends: it is ``None``.
    """
    end = max(index for index, label in enumerate(labels) if label != IGNORED) + 1
    start = next((index + 1 for index in range(end - 1, -1, -1) if labels[index] == IGNORED), 0)
    return (ids[:start] if start > 1 else None), ids[start:end]


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
    """Evaluate the base alone, and with each adapter; a bar shows the progress, if ``show``.

    Args:
        module: A :class:`~qlora_lightning.model.module.QLoRAModule`.
        batches: As a loader gives them, on the host.
        rows: To answer: the first that :func:`unpack_rows` finds in these batches. One without a prompt is left out.
        settings: How to answer; ``None``: no row is answered.
        adapters: PEFT's names of them, by the names that they have in the results.
        show: Whether a terminal gets the bar.
        on_answers: Called as soon as a batch of answers is there.
        next_token: Whether the loss is that of the next token, whatever the module's ``compute_loss`` does.
    """
    model, results = module.model, {}
    losses = sum(len(unpack_rows(batch)) for batch in batches)
    steps = (1 + len(adapters)) * (losses + (len(rows) if settings else 0))
    with progress_counter(f"base and {', '.join(adapters)}", steps, show) as count:
        for side in (BASE, *adapters):
            if side != BASE:
                model.set_adapter(adapters[side])
            hidden = with_adapter(model, None) if side == BASE else nullcontext()
            with hidden, collective_passes(module), dense_weights(model):
                found = _evaluate_rows(module, batches, count, next_token)
                answers = answer_rows(module, rows, settings, count, partial(on_answers, side)) if settings else {}
            results[side] = [each._replace(answer=answers.get(index)) for index, each in enumerate(found)]
    return results


@torch.no_grad()
def _evaluate_rows(module: Any, batches: Iterable[Any], watch: ProgressCounter, next_token: bool) -> list[RowResult]:
    """Compute the loss of every row of some batches by a module as it is now, whose training mode is restored."""
    was_training, results = module.training, []
    module.eval()
    try:
        for batch in batches:
            for sums in row_losses(module, batch, next_token):
                results.append(RowResult(float(sums.nll_sum), int(sums.labelled_tokens), int(sums.correct)))
                watch(1)
    finally:
        module.train(was_training)
    return results


def row_losses(module: Any, batch: Mapping[str, Any], next_token: bool = False) -> Iterator[LossSums]:
    """Compute what ``module.compute_loss`` returns for each row alone that :func:`unpack_rows` finds in a batch.

    If that is not overridden, rows go through the model together, which is two to three times as quick. An override
    gets one row after the other: only it knows how its loss is made up, unless ``next_token`` asks for the usual one.
    """
    if not is_flat(batch) or (module.overrides("compute_loss") and not next_token):
        for row in _labelled_rows(batch) if is_flat(batch) else [batch]:
            on_device = module.transfer_batch_to_device(row, module.device, 0)
            yield from module.run_in_parts(on_device, module.compute_loss)
        return
    for sums in module.run_in_parts(batch, lambda part: _losses_of_samples(module, part)):
        yield from sums


def _losses_of_samples(module: Any, part: Mapping[str, Any]) -> list[LossSums]:
    states, targets = module.last_states(part)
    head, counts = lm_head_of(module.causal_lm), part["layout"].counts
    with module.autocast():
        pairs = zip(states.split(counts), targets.split(counts), strict=True)
        return [head_loss(own, wanted, head, fast=module.fast) for own, wanted in pairs if len(wanted)]


def answer_rows(
    module: Any,
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings,
    watch: ProgressCounter = lambda steps: None,
    on_answers: Callable[[Sequence[EvaluationRow], Sequence[Answer]], None] = lambda rows, answers: None,
) -> dict[int, Answer]:
    """Answer the rows that have a prompt, and score the answers; return them by the rows' indices.

    Rows of like length are answered together, the longest first: memory that does not suffice fails at once.
    """
    limit, found = settings.max_new_tokens, dict[int, Answer]()
    prompts = {index: row.prompt for index, row in enumerate(rows) if row.prompt is not None}
    longest_first = sorted(prompts, key=lambda index: -len(prompts[index]))
    with collective_passes(module), dense_weights(module.model):
        for start in range(0, len(longest_first), settings.batch_size):
            indices = longest_first[start : start + settings.batch_size]
            own = [rows[index] for index in indices]
            ids = module.answer([row.prompt for row in own], settings.stop_ids, limit, batch_size=len(own), watch=watch)
            texts = [settings.decode(answer) for answer in ids]
            answers = [
                Answer(text, len(answer), len(answer) < limit, settings.score(text, row))
                for text, answer, row in zip(texts, ids, own, strict=True)
            ]
            found |= zip(indices, answers, strict=True)
            on_answers(own, answers)
    return {index: found[index] for index in prompts}
