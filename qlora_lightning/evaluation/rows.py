"""Rows to evaluate, and what a model makes of them: loss, answer and scores of each."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_lightning.evaluation.comparison import BASE, Answer, RowResult
from qlora_lightning.evaluation.scores import SCORES
from qlora_lightning.model.adapters.lora import without_adapters
from qlora_lightning.model.answers import dense_weights
from qlora_lightning.model.sharded import collective_passes
from qlora_lightning.model.step.batch import cut_into_rows, is_flat
from qlora_lightning.model.step.layout import IGNORED
from qlora_lightning.model.step.loss import LossSums, head_loss, lm_head_of
from qlora_lightning.support.console import terminal

Watch = Callable[[int], None]
"""Called with the number of losses or answers that are done now."""


@dataclass
class EvaluationRow:
    """One row.

    Attributes:
        number: Its number in its split; -1 for a batch that is not flat.
        source: Number of the split's source that it is from, or its name.
        prompt: Token ids before the last answer; ``None`` if no prompt is before what is labelled.
        expected: Token ids of the last answer, its stop token included.
        place: File and line, if they are known.
        group: What it is counted under, if the user groups rows.
        is_pair: Whether it is two answers to compare; prompt and expected answer are those of the chosen one.
    """

    number: int
    source: str
    prompt: list[int] | None
    expected: list[int]
    place: str = ""
    group: str = ""
    is_pair: bool = False


def limit_batches(loader: Any, limit: float) -> Iterator[Any]:
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
        rows.append(EvaluationRow(number, source, prompt, expected, is_pair=row.get("pairs", False)))
    return rows


def split_sample(ids: list[int], labels: list[int]) -> tuple[list[int] | None, list[int]]:
    """Return what is before the last run of labelled tokens, and that run.

    With all tokens labelled (``train_on: all``) nobody knows where the prompt ends: it is ``None``.
    """
    end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
    start = next((place + 1 for place in range(end - 1, -1, -1) if labels[place] == IGNORED), 0)
    return (ids[:start] if start > 1 else None), ids[start:end]


def _labelled_rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in cut_into_rows(batch) if bool((row["labels"] != IGNORED).any())]


@dataclass(frozen=True)
class AnswerSettings:
    """How rows are answered and scored.

    Attributes:
        tokenizer: Of the model.
        stop_ids: Tokens that end an answer.
        scores: Names of the scores, the one that counts most first.
        max_new_tokens: Length at which an answer is cut.
        batch_size: Rows that are answered together, at most.
    """

    tokenizer: Any
    stop_ids: list[int]
    scores: list[str]
    max_new_tokens: int
    batch_size: int

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without control tokens and space around it."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()


def evaluate_sides(
    module: Any,
    batches: Sequence[Mapping[str, Any]],
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings | None,
    adapters: Mapping[str, str],
    show: bool = True,
) -> dict[str, list[RowResult]]:
    """Evaluate the base alone, and with each adapter; a bar shows how far it is, if ``show``.

    ``adapters`` are PEFT's names of them, by the names that they have in the results; the rest is as in
    :func:`evaluate_rows`.
    """
    model, results = module.model, {}
    losses = sum(len(unpack_rows(batch)) for batch in batches)
    steps = (1 + len(adapters)) * (losses + (len(rows) if settings else 0))
    with steps_bar(f"base and {', '.join(adapters)}", steps, show) as watch:
        for side in (BASE, *adapters):
            if side != BASE:
                model.set_adapter(adapters[side])
            with without_adapters(model) if side == BASE else nullcontext():
                results[side] = evaluate_rows(module, batches, rows, settings, watch)
    return results


@torch.no_grad()
def evaluate_rows(
    module: Any,
    batches: Iterable[Mapping[str, Any]],
    rows: Sequence[EvaluationRow] = (),
    settings: AnswerSettings | None = None,
    watch: Watch = lambda steps: None,
) -> list[RowResult]:
    """Compute the loss of every row of some batches by a module as it is now, and answer the first rows.

    Args:
        module: A :class:`~qlora_lightning.model.module.QLoRAModule`; its training mode is restored.
        batches: As a loader gives them, on the host.
        rows: To answer: the first that :func:`unpack_rows` finds in these batches. One without a prompt is left out.
        settings: How to answer; ``None``: no row is answered.
        watch: Called for each loss and each answer.
    """
    was_training = module.training
    module.eval()
    results = []
    try:
        with collective_passes(module), dense_weights(module.model):
            for batch in batches:
                for sums in row_losses(module, batch):
                    results.append(RowResult(float(sums.nll_sum), int(sums.labelled_tokens), int(sums.correct)))
                    watch(1)
            if settings is not None:
                asked = [place for place, row in enumerate(rows) if row.prompt is not None]
                answers = answer_rows(module, [rows[place] for place in asked], settings, watch)
                for place, answer in zip(asked, answers, strict=True):
                    results[place] = results[place]._replace(answer=answer)
    finally:
        module.train(was_training)
    return results


def row_losses(module: Any, batch: Mapping[str, Any]) -> Iterator[LossSums]:
    """Compute what ``module.compute_loss`` returns for each row alone that :func:`unpack_rows` finds in a batch.

    If that is not overridden, rows go through the model together, which is two to three times as quick. An override
    gets one row after the other: only it knows how its loss is made up.
    """
    if not is_flat(batch) or module.overrides("compute_loss"):
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
    module: Any, rows: Sequence[EvaluationRow], settings: AnswerSettings, watch: Watch = lambda steps: None
) -> list[Answer]:
    """Answer rows from their prompts alone, and score the answers."""
    limit, answers = settings.max_new_tokens, []
    prompts = [row.prompt for row in rows]
    found = module.answer(prompts, settings.stop_ids, limit, batch_size=settings.batch_size, watch=watch)
    for row, ids in zip(rows, found, strict=True):
        text, expected = settings.decode(ids), settings.decode(row.expected)
        scores = {name: SCORES[name](text, expected) for name in settings.scores}
        answers.append(Answer(text, len(ids), len(ids) < limit, scores))
    return answers


@contextmanager
def steps_bar(description: str, total: int, show: bool = True) -> Iterator[Watch]:
    """Yield a function to call with the number of steps done; in a terminal it moves a bar, gone at the end."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = terminal(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(escape(description), total=total)
        yield lambda steps: progress.advance(task, steps)
