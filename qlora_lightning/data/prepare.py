"""From rows to samples or prompts, in chunks, with a report on the rows."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from qlora_lightning.data.chat.conversation import RenderedText, split_reasoning
from qlora_lightning.data.chat.lengths import shorten, split_up
from qlora_lightning.data.chat.renderer import ChatRenderer, TokenizedSample
from qlora_lightning.data.report import DataReport
from qlora_lightning.data.rows.content import (
    MAX_TEXT,
    TOO_LARGE,
    Chat,
    Content,
    Judged,
    Pair,
    RowContent,
    RowFault,
    Text,
    size_of,
)
from qlora_lightning.data.rows.files import BadRow, Row, Source
from qlora_lightning.data.rows.formats import RowConverter
from qlora_lightning.data.samples import SampleSet, SampleSetBuilder, find_repeats, hold_out
from qlora_lightning.sources.tensors import IGNORED
from qlora_lightning.support.console import count_of
from qlora_lightning.support.errors import bounded

# what the tokenizer encodes together, on all cores; it takes a hundred times the memory of the text
_CHUNK_ROWS, _CHUNK_TEXT = 512, 8_000_000
_ALL_BAD = 10_000  # rows, after which a file without one good row is read no further
_PAUSE = 10.0  # seconds between two lines of the log

Rows = Iterable[Row | BadRow]
Prepared = tuple[SampleSet, DataReport]


class Prompt(NamedTuple):
    """One row to predict: the ids that generation starts from, the row's own answer if it has one, and the row."""

    ids: list[int]
    reference: str | None
    row_id: int
    values: dict[str, Any]


class _WrittenRow(NamedTuple):
    """A good row, with the numbers of row and source in the split, and the texts of its content or of a pair's two."""

    number: int
    source: int
    row: Row
    content: RowContent
    parts: list[tuple[Content, list[RenderedText]]]


def divide(samples: SampleSet, report: DataReport, fraction: float, seed: int) -> list[Prepared]:
    """Hold validation rows out of training rows; rows dropped earlier are reported with the training rows."""
    train, val = hold_out(samples, fraction, seed)
    n_dropped = sum(report.dropped.values()) + report.bad_rows
    divided = [
        (train, replace(report, rows=len(np.unique(train.row_ids)) + n_dropped)),
        (val, DataReport("val", len(np.unique(val.row_ids)), formats=report.formats, files=report.files)),
    ]
    for samples, report in divided:
        report.count_samples(samples)
        report.count_duplicates(samples)
    return divided


@dataclass
class Preparation:
    """Turns the rows of a split into samples, or to predict into prompts, and reports on them.

    The samples of a row depend on it and the settings alone. With ``pairs`` a row is two answers to compare, and its
    sample is both, one after the other; or all rows have one answer with a verdict.
    """

    renderer: ChatRenderer
    split: str
    max_length: int
    too_long: str
    pairs: bool
    drop_answers: Sequence[str]  # answers that mean that there is none, in lower case
    reading: Callable[[], AbstractContextManager[Any]] = nullcontext  # returns the context in which a chunk is read

    def __post_init__(self) -> None:
        self.for_prompts = self.split == "predict"  # without labels; rows may lack answers
        self.report, self.builder, self.prompts = DataReport(self.split), SampleSetBuilder(), list[Prompt]()
        self.converters = dict[Source, RowConverter]()  # in the order in which sources appear
        self._are_pairs: bool | None = None  # the rows so far

    def prepare(self, rows: Rows, deduplicate: bool) -> Prepared:
        """Turn all rows into samples."""
        report, log_time, chunks = self.report, time.monotonic(), _in_chunks(rows)

        def read_chunk() -> list[Row | BadRow] | None:
            with self.reading():
                return next(chunks, None)

        for chunk in iter(read_chunk, None):
            earlier = list(self.converters.values())
            self._add(chunk)
            for converter in earlier:  # which have had hundreds of rows
                converter.check()
            if report.bad_rows == report.rows > _ALL_BAD:
                report.check(skip_bad=False)
            if time.monotonic() - log_time > _PAUSE:
                rank_zero_info(f"{self.split}: {count_of(report.rows, 'row')} prepared")
                log_time = time.monotonic()
        for converter in self.converters.values():
            converter.check()
            report.formats += [name for name in converter.formats if name not in report.formats]
            report.unread_columns += [name for name in converter.unread_columns if name not in report.unread_columns]
            report.absent_columns += sorted(converter.absent_columns)
        samples = self.builder.build()
        if deduplicate and not self.for_prompts:
            duplicates = find_repeats(samples).row_ids
            samples = samples.take(np.flatnonzero(~np.isin(samples.row_ids, duplicates)))
            if len(duplicates):
                report.drop("equal to an earlier row (deduplicate: true)", len(duplicates))
        elif not self.for_prompts:
            report.count_duplicates(samples)
        report.count_samples(samples)
        return samples, report

    def _add(self, rows: Sequence[Row | BadRow]) -> None:
        """Add rows; bad ones are reported and left out."""
        # without a bound: a function that converts rows may be the user's own code
        converted = [self._convert(number, row) for number, row in enumerate(rows, start=self.report.rows)]
        results = list[_WrittenRow | BadRow | None]()
        with bounded("", "chat_template.cost") as begin:
            for each in converted:
                if isinstance(each, _WrittenRow) and not self.for_prompts:  # a prompt is rendered and encoded at once
                    begin(f"{each.row.where} cannot be rendered by the chat template")
                    results.append(self._write(each))
                else:
                    results.append(each)
        parts = [part for result in results if isinstance(result, _WrittenRow) for part in result.parts]
        self.renderer.encode([text for _, texts in parts for text in texts])
        for result in results:
            bad = result if isinstance(result, BadRow) else None
            if isinstance(result, _WrittenRow):
                try:
                    self._add_prompt(result) if self.for_prompts else self._add_samples(result)
                except RowFault as fault:
                    bad = BadRow(result.row.where, str(fault))
            if bad:
                self.report.count_bad_row(bad)
        self.report.rows += len(rows)

    def _convert(self, number: int, row: Row | BadRow) -> _WrittenRow | BadRow:
        """Return a row with its content, without texts."""
        assert row.source is not None
        if row.source not in self.converters:
            pairs = self.pairs and not self.for_prompts
            self.converters[row.source] = RowConverter(row.source, not self.for_prompts, pairs)
        if isinstance(row, BadRow):
            return row
        self.report.count_lines(row)
        source = list(self.converters).index(row.source)
        try:
            return _WrittenRow(number, source, row, self.converters[row.source].convert(row), [])
        except RowFault as fault:
            return BadRow(row.where, str(fault))

    def _write(self, converted: _WrittenRow) -> _WrittenRow | BadRow | None:
        """Render the content of a row as texts; None if it is dropped."""
        contents = _contents_of(converted.content)
        try:
            if not self._is_wanted(converted.row, contents):
                return None
            return converted._replace(parts=[(each, self.renderer.write(each)) for each in contents])
        except RowFault as fault:
            return BadRow(converted.row.where, str(fault))

    def _is_wanted(self, row: Row, contents: Sequence[Content]) -> bool:
        """Whether a row is trained: not if an answer is one of ``drop_answers``; suspicious rows are noted."""
        if self._are_pairs not in (None, len(contents) == 2):
            raise RowFault("two answers to compare and answers with a label do not mix: give each a run")
        self._are_pairs = len(contents) == 2
        messages = [message for content in contents if isinstance(content, Chat) for message in content.messages]
        answers = [message for message in messages if message["role"] == "assistant"]
        answer_texts = sorted({answer["content"].strip() for answer in answers})
        if not {text.lower() for text in answer_texts}.isdisjoint(self.drop_answers):
            self.report.drop("an answer is one of data.drop_answers")
            return False
        questions = [message["content"] for message in messages if message["role"] == "user"]
        texts = [content.text for content in contents if isinstance(content, Text)]
        texts += [message["content"] + message.get("reasoning_content", "") for message in messages]
        if any(split_reasoning(answer)[0] is None for answer in answers):
            self.report.unreasoned += self.renderer.template.opens_reasoning
        self.report.note_suspicious(row.where, answer_texts, questions, "\n".join(texts))
        return True

    def _add_prompt(self, written: _WrittenRow) -> None:
        number, source, row, content, _ = written
        if not isinstance(content, Chat):
            raise RowFault("holds no conversation, so there is nothing to answer")
        *earlier, last = content.messages
        reference = last["content"] if last["role"] == "assistant" else None
        if reference is not None and ("tool_calls" in last or "reasoning_content" in last):
            # as the model would write it
            sample = self.renderer.render_answers(content.messages, content.tools, [len(earlier)])
            labels = [label for label in sample.labels if label not in (IGNORED, *self.renderer.stop_ids)]
            reference = str(self.renderer.tokenizer.decode(labels))
        ids = self.renderer.render_prompt(content.messages if reference is None else earlier, content.tools)
        self.builder.add(ids, [IGNORED] * len(ids), number, source, row.file, row.line)
        self.prompts.append(Prompt(ids, reference, number, row.values))

    def _add_samples(self, written: _WrittenRow) -> None:
        """Add the samples of a row, or count why it has none."""
        row, content, report = written.row, written.content, self.report
        parts = [(part, texts, self.renderer.label(part, texts)) for part, texts in written.parts]
        samples = [sample for _, _, part_samples in parts for sample in part_samples]
        fitted = [[sample for sample in self._fit(*part) if _count(sample)] for part in parts]
        system = row.source.system if row.source else None
        add = partial(
            self.builder.add,
            row_id=written.number,
            source=written.source,
            file=row.file,
            line=row.line,
            prompt=self.renderer.hash_prompt(parts[0][0], system),
        )
        if self.pairs and len(samples) > len(parts):
            report.leave_untrained("the chat template makes several samples of an answer, which cannot be compared")
        elif not any(map(_count, samples)):
            report.leave_untrained("every answer is marked `train: false`")
        elif not all(fitted):
            if self.too_long == "drop" and any(len(sample.ids) > self.max_length for sample in samples):
                report.drop("longer than max_length (too_long: drop)")
            else:
                report.leave_untrained("no labeled token within max_length")
        elif isinstance(content, Pair):
            (chosen,), (rejected,) = fitted
            if chosen == rejected:
                report.drop("their two answers are the same within max_length")
            elif [chosen, rejected] != samples and _prompt_of(chosen) != _prompt_of(rejected):
                report.drop("their prompt is too long for the two answers to share what is left of it")
            else:
                add(chosen.ids + rejected.ids, chosen.labels + rejected.labels, chosen_length=len(chosen.ids))
        else:
            desirable = content.label if isinstance(content, Judged) else None
            for ids, labels in fitted[0]:
                add(ids, labels, desirable=desirable)

    def _fit(
        self, content: Content, texts: Sequence[RenderedText], samples: Sequence[TokenizedSample]
    ) -> Sequence[TokenizedSample]:
        """Return the samples of a content; ``too_long`` is applied to those over ``max_length``."""
        max_length = self.max_length
        if all(len(sample.ids) <= max_length for sample in samples):
            return samples
        if isinstance(content, Text) or self.too_long == "split":
            context = 1 if isinstance(content, Text) else None  # every piece of a text is trained
            return [piece for sample in samples for piece in split_up(sample, max_length, context)]
        fitted = list[TokenizedSample]()
        if self.too_long == "truncate" and isinstance(content, Chat):
            for sample, text in zip(samples, texts, strict=True):
                if len(sample.ids) <= max_length:
                    fitted.append(sample)
                    continue
                trained = [answer.message for answer in text.answers]
                shortened = shorten(self.renderer, content.messages, content.tools, trained, max_length)
                if shortened is not None:
                    fitted.append(shortened)
                    self.report.shortened += 1
        elif self.too_long == "truncate":
            fitted = [TokenizedSample(sample.ids[:max_length], sample.labels[:max_length]) for sample in samples]
            self.report.shortened += len(fitted)
        self.report.lost_labels += sum(map(_count, samples)) - sum(map(_count, fitted))
        return fitted


def _contents_of(content: RowContent) -> list[Content]:
    """Return the content of a row, or of a pair's two."""
    match content:
        case Pair(chosen, rejected):
            return [chosen, rejected]
        case Judged(chat):
            return [chat]
        case _:
            return [content]


def _in_chunks(rows: Rows) -> Iterator[list[Row | BadRow]]:
    """Yield rows in chunks; a row with more than ``MAX_TEXT`` becomes a bad one."""
    chunk, chunk_text = list[Row | BadRow](), 0
    for row in rows:
        row_text = size_of(row.values) if isinstance(row, Row) else 0
        is_bad = row_text > MAX_TEXT
        chunk.append(BadRow(row.where, TOO_LARGE, row.source) if is_bad else row)
        chunk_text += 0 if is_bad else row_text
        if len(chunk) == _CHUNK_ROWS or chunk_text > _CHUNK_TEXT:
            yield chunk
            chunk, chunk_text = [], 0
    if chunk:
        yield chunk


def _prompt_of(sample: TokenizedSample) -> list[int]:
    return sample.ids[: next(i for i, label in enumerate(sample.labels) if label != IGNORED)]


def _count(sample: TokenizedSample) -> int:
    """Count labeled tokens."""
    return len(sample.labels) - sample.labels.count(IGNORED)
