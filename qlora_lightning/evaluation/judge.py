"""Lets a model judge and answer rows: loss and scores of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_lightning.evaluation.scores import Judgement, choose_scores, describe_mixture, judge_answer
from qlora_lightning.model.batch import cut_into_rows, is_flat
from qlora_lightning.model.generate import dense_weights
from qlora_lightning.model.layout import IGNORED, next_labels
from qlora_lightning.model.loss import LossSums, head_loss, head_of

_MOST_TOKENS = 2048  # of rows whose losses are computed in one pass: more make it no quicker
_MOST_NEW, _FEWEST_NEW = 512, 32


@dataclass
class EvaluationRow:
    """One row.

    Attributes:
        batch: It alone, as a flat batch.
        number: Its number in its split.
        source: Which of the split's sources it came from.
        prompt: Token ids before the last answer; ``None`` if no prompt is before what is labelled.
        expected: Token ids of the last answer, its stop token included.
        place: File and line, if they are known.
        group: What it is counted under, if the user groups rows.
    """

    batch: dict[str, Any]
    number: int
    source: int
    prompt: list[int] | None
    expected: list[int]
    place: str = ""
    group: str | None = None


def cut_rows(batch: Mapping[str, Any]) -> list[EvaluationRow]:
    """Cut a flat batch into rows to judge; fillers, and rows without a labelled token, are left out.

    A batch of another form is judged as a whole, by its loss.
    """
    if not is_flat(batch):
        return [EvaluationRow(dict(batch), -1, 0, None, [])]
    rows = []
    for alone in cut_into_rows(batch):
        ids, labels = alone["input_ids"][0].tolist(), alone["labels"][0].tolist()
        if any(label != IGNORED for label in labels):
            prompt, expected = split_sample(ids, labels)
            rows.append(EvaluationRow(alone, int(alone["row_ids"][0]), int(alone["source"][0]), prompt, expected))
    return rows


def split_sample(ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int] | None, list[int]]:
    """Return what stands before the last run of labelled tokens, and that run.

    With all tokens labelled (``train_on: all``) nobody knows where the prompt ends: it is ``None``.
    """
    end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
    start = next((place + 1 for place in range(end - 1, -1, -1) if labels[place] == IGNORED), 0)
    return (list(ids[:start]) if start > 1 else None), list(ids[start:end])


def choose_max_new_tokens(rows: Sequence[EvaluationRow]) -> int:
    """Return twice the tokens of the longest expected answer, from 32 to 512: what rambles on shall not cost more."""
    longest = max((len(row.expected) for row in rows), default=0)
    return min(max(2 * longest, _FEWEST_NEW), _MOST_NEW)


@dataclass(frozen=True)
class Answering:
    """How rows are answered and scored.

    Attributes:
        tokenizer: Of the model.
        stop_ids: Tokens that end an answer.
        scores: Names of the scores, the one that counts most first.
        max_new_tokens: Length at which an answer is cut.
        batch_size: Rows that are answered together, at most.
        mixture: A note on answers of several kinds; ``None``: there are none.
    """

    tokenizer: Any
    stop_ids: list[int]
    scores: list[str]
    max_new_tokens: int
    batch_size: int
    mixture: str | None = None

    @classmethod
    def of(
        cls,
        rows: Sequence[EvaluationRow],
        tokenizer: Any,
        stop_ids: Sequence[int],
        scores: str | Sequence[str] = "auto",
        max_new_tokens: int | None = None,
        batch_size: int = 64,
    ) -> "Answering":
        """Choose what the user left open by the answers that the rows hold."""
        references = tokenizer.batch_decode([row.expected for row in rows], skip_special_tokens=True)
        texts = [text.strip() for text in references]
        limit = max_new_tokens or choose_max_new_tokens(rows)
        mixture = describe_mixture(texts, scores)
        return cls(tokenizer, list(stop_ids), choose_scores(texts, scores), limit, batch_size, mixture)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without control tokens and space around it."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()


@torch.no_grad()
def judge_rows(
    module: Any,
    rows: Sequence[EvaluationRow],
    answering: Answering | None = None,
    answered: int = 0,
    watch: Callable[[int], None] = lambda steps: None,
) -> list[Judgement]:
    """Judge rows by a module as it is now; its training mode is put back.

    Args:
        module: A :class:`~qlora_lightning.model.module.QLoRAModule`: ``compute_loss`` and ``answer`` are called.
        rows: To judge.
        answering: How to answer; ``None``: by the loss alone.
        answered: How many of the rows, the first, are answered.
        watch: Called with 1 for each loss and each answer that is done.
    """
    was_training = module.training
    module.eval()
    try:
        with dense_weights(module.model):
            judgements = list(_judge_losses(module, rows, watch))
            if answering is not None:
                _add_answers(module, rows[:answered], judgements, answering, watch)
    finally:
        module.train(was_training)
    return judgements


def answer_rows(
    module: Any, rows: Sequence[EvaluationRow], answering: Answering, watch: Callable[[int], None] = lambda steps: None
) -> list[list[int]]:
    """Answer rows, each of which has a prompt; gives token ids."""
    prompts = [row.prompt for row in rows]
    limit, size = answering.max_new_tokens, answering.batch_size
    answers: list[list[int]] = module.answer(prompts, answering.stop_ids, limit, batch_size=size, watch=watch)
    return answers


def _judge_losses(module: Any, rows: Sequence[EvaluationRow], watch: Callable[[int], None]) -> Iterator[Judgement]:
    batches = [_on(module.device, row.batch) for row in rows]
    for sums in losses_of_rows(module, batches):
        watch(1)
        yield Judgement(float(sums.nll_sum), int(sums.labelled_tokens), int(sums.correct or 0))


def losses_of_rows(module: Any, rows: Sequence[Mapping[str, Any]]) -> Iterator[LossSums]:
    """Compute what ``module.compute_loss`` returns for each row alone.

    If that is not overridden, rows go through the model together, which is two to three times as quick. An override
    gets one row after the other: only it knows how its loss is made up.

    Args:
        module: A :class:`~qlora_lightning.model.module.QLoRAModule`; its mode is not changed.
        rows: Each a batch, on the module's device.
    """
    if module.overrides("compute_loss") or not all(map(is_flat, rows)):
        yield from map(module.compute_loss, rows)
        return
    groups: list[list[Mapping[str, Any]]] = []
    tokens = _MOST_TOKENS
    for row in rows:
        length = row["input_ids"].shape[1]
        if tokens + length > _MOST_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(row)
        tokens += length
    for group in groups:
        yield from _losses_of_group(module, group)


def _losses_of_group(module: Any, rows: Sequence[Mapping[str, Any]]) -> Iterator[LossSums]:
    lengths = torch.tensor([row["input_ids"].shape[1] for row in rows])
    batch = {name: torch.cat([row[name] for row in rows], 1) for name in ("input_ids", "position_ids", "labels")}
    states, targets = module.last_states({**batch, "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0))})
    counts = [int((next_labels(row["labels"][0]) != IGNORED).sum()) for row in rows]
    head = head_of(module.causal_lm)
    for own, wanted in zip(states.split(counts), targets.split(counts), strict=True):
        with module.autocast():
            yield head_loss(own, wanted, head, fast=module.fast)


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _add_answers(
    module: Any,
    rows: Sequence[EvaluationRow],
    judgements: Sequence[Judgement],
    answering: Answering,
    watch: Callable[[int], None],
) -> None:
    asked = [(row, judgement) for row, judgement in zip(rows, judgements, strict=False) if row.prompt is not None]
    answers = answer_rows(module, [row for row, _ in asked], answering, watch)
    for (row, judgement), ids in zip(asked, answers, strict=True):
        judgement.answer = answering.decode(ids)
        judgement.answer_tokens, judgement.stopped = len(ids), len(ids) < answering.max_new_tokens
        judgement.scores = judge_answer(judgement.answer, answering.decode(row.expected), answering.scores)


@contextmanager
def steps_bar(description: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of steps done; in a terminal it moves a bar, gone at the end."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(escape(description), total=total)
        yield lambda steps: progress.advance(task, steps)
