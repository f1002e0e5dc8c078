"""From rows to samples or prompts, in chunks, with a report on the rows."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from qlora_lightning.data.chat.labels import ChatRenderer, Rendered
from qlora_lightning.data.chat.lengths import shorten, split_up
from qlora_lightning.data.chat.render import RenderedText
from qlora_lightning.data.data_report import DataReport
from qlora_lightning.data.rows.bad_rows import MAX_TEXT, TOO_MUCH_TEXT, BadRow, RowFault, count_text
from qlora_lightning.data.rows.conversation import Chat, Content, Pair, Text
from qlora_lightning.data.rows.convert import RowConverter
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import Source
from qlora_lightning.data.samples import SampleSet, SampleSetBuilder, find_repeats, hold_out
from qlora_lightning.sources.tensors import IGNORED

TOO_LONG = "longer than max_length (too_long: drop)"
# what the tokenizer encodes together, on all cores; it takes a hundred times the memory of the text
_CHUNK_ROWS, _CHUNK_TEXT = 512, 8_000_000
_PAUSE = 10.0  # seconds between two lines of the log

Rows = Iterable[Row | BadRow]
Prepared = tuple[SampleSet, DataReport]


class Prompt(NamedTuple):
    """One row to predict: the ids that generation starts from, the row's own answer if it has one, and the row."""

    ids: list[int]
    reference: str | None
    row_id: int
    values: dict[str, Any]


@dataclass
class _Part:
    """The content of a row, or one of a pair's two; ``Preparation`` then fills in its texts and samples."""

    content: Content
    texts: Sequence[RenderedText] = ()
    samples: Sequence[Rendered] = ()  # before max_length applies


class _Converted(NamedTuple):
    """A good row, with the numbers of row and source in the split, and its content in one part, or of a pair in two."""

    number: int
    source: int
    row: Row
    parts: Sequence[_Part]

    @property
    def is_pair(self) -> bool:
        return len(self.parts) == 2


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
    missing: Sequence[str]  # answers that mean that there is none, in lower case

    def __post_init__(self) -> None:
        self.for_prompts = self.split == "predict"  # without labels; rows may lack answers
        self.report, self.builder, self.prompts = DataReport(self.split), SampleSetBuilder(), list[Prompt]()
        self.converters = dict[Source, RowConverter]()  # in the order in which sources appear
        self._are_pairs: bool | None = None

    def prepare(self, rows: Rows, deduplicate: bool) -> Prepared:
        """Turn all rows into samples."""
        report, log_time = self.report, time.monotonic()
        for chunk in _in_chunks(rows):
            earlier = list(self.converters.values())
            self._add(chunk)
            for converter in earlier:  # which have had hundreds of rows
                converter.check()
            if time.monotonic() - log_time > _PAUSE:
                rank_zero_info(f"{self.split}: {report.rows:,} rows prepared")
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

    def _find_converter(self, source: Source | None) -> RowConverter:
        assert source is not None
        if source not in self.converters:
            pairs = self.pairs and not self.for_prompts
            self.converters[source] = RowConverter(source.settings, not self.for_prompts, pairs)
        return self.converters[source]

    def _add(self, rows: Sequence[Row | BadRow]) -> None:
        """Add rows; bad ones are reported and left out."""
        renderer, bad = self.renderer, dict[int, BadRow]()
        written = list[_Converted]()
        for number, row in enumerate(rows, start=self.report.rows):
            converter = self._find_converter(row.source)
            if isinstance(row, BadRow):
                bad[number] = row
                continue
            with _noting_faults(number, row, bad):
                content = converter.convert(row)
                parts = [_Part(part) for part in (content if isinstance(content, Pair) else [content])]
                converted = _Converted(number, [*self.converters.values()].index(converter), row, parts)
                if self.for_prompts:
                    self._add_prompt(converted)
                elif self._is_wanted(converted):
                    for part in parts:
                        part.texts = renderer.write(part.content)
                    written.append(converted)
        encoded = iter(renderer.encode([text for each in written for part in each.parts for text in part.texts]))
        for converted in written:
            # all of a row's, before one of its parts may be at fault
            encodings = [[next(encoded) for _ in part.texts] for part in converted.parts]
            with _noting_faults(converted.number, converted.row, bad):
                for part, part_encodings in zip(converted.parts, encodings, strict=True):
                    part.samples = renderer.label(part.content, part.texts, part_encodings)
                self._add_samples(converted)
        self.report.rows += len(rows)
        for number in sorted(bad):
            self.report.count_bad_row(bad[number])

    def _is_wanted(self, converted: _Converted) -> bool:
        """Whether a row is trained: not if an answer is one of ``missing``; suspicious rows are noted."""
        if self._are_pairs not in (None, converted.is_pair):
            raise RowFault("two answers to compare and answers with a verdict do not mix: give each a run")
        self._are_pairs = converted.is_pair
        chats = [part.content for part in converted.parts if isinstance(part.content, Chat)]
        messages = [message for chat in chats for message in chat.messages]
        answers = {message["content"].strip() for message in messages if message["role"] == "assistant"}
        if not {answer.lower() for answer in answers}.isdisjoint(self.missing):
            self.report.drop("an answer is one of data.missing")
            return False
        questions = [message["content"] for message in messages if message["role"] == "user"]
        texts = [part.content.text for part in converted.parts if isinstance(part.content, Text)]
        text = "\n".join([*texts, *(message["content"] for message in messages)])
        self.report.note_suspicious(converted.row.where, sorted(answers), questions, text)
        return True

    def _add_prompt(self, converted: _Converted) -> None:
        number, source, row, (part,) = converted
        content = part.content
        if not isinstance(content, Chat):
            raise RowFault("holds no conversation, so there is nothing to answer")
        *earlier, last = content.messages
        reference = last["content"] if last["role"] == "assistant" else None
        ids = self.renderer.render_prompt(content.messages if reference is None else earlier, content.tools)
        self.builder.add(ids, [IGNORED] * len(ids), number, source, row.file, row.line)
        self.prompts.append(Prompt(ids, reference, number, row.values))

    def _add_samples(self, converted: _Converted) -> None:
        """Add the samples of a row, or count why it has none."""
        (number, source, row, parts), report = converted, self.report
        add = partial(self.builder.add, prompt=self.renderer.hash_prompt(parts[0].content))
        fitted = [[sample for sample in self._fit(part) if _count(sample)] for part in parts]
        samples = [sample for part in parts for sample in part.samples]
        if self.pairs and any(len(part.samples) > 1 for part in parts):
            report.leave_untrained("the chat template makes several samples of an answer, which cannot be compared")
        elif not any(map(_count, samples)):
            report.leave_untrained("every answer is marked `train: false`")
        elif not all(fitted):
            if self.too_long == "drop" and any(len(sample.ids) > self.max_length for sample in samples):
                report.drop(TOO_LONG)
            else:
                report.leave_untrained("no labelled token within max_length")
        elif converted.is_pair:
            (chosen,), (rejected,) = fitted
            if chosen == rejected:
                report.drop("their two answers are the same within max_length")
            elif [chosen, rejected] != samples and _prompt_of(chosen) != _prompt_of(rejected):
                report.drop("their prompt is too long for the two answers to share what is left of it")
            else:
                ids, labels = chosen.ids + rejected.ids, chosen.labels + rejected.labels
                add(ids, labels, number, source, row.file, row.line, len(chosen.ids))
        else:
            content = parts[0].content
            desirable = content.desirable if isinstance(content, Chat) else None
            for ids, labels in fitted[0]:
                add(ids, labels, number, source, row.file, row.line, desirable=desirable)

    def _fit(self, part: _Part) -> Sequence[Rendered]:
        """Return the samples of a part; ``too_long`` is applied to those over ``max_length``."""
        content, samples, max_length, too_long = part.content, part.samples, self.max_length, self.too_long
        if all(len(sample.ids) <= max_length for sample in samples):
            return samples
        if isinstance(content, Text) or too_long == "split":
            context = 1 if isinstance(content, Text) else None  # every piece of a text is trained
            return [piece for sample in samples for piece in split_up(sample, max_length, context)]
        fitted = list[Rendered]()
        if too_long == "truncate" and isinstance(content, Chat):
            for sample, text in zip(samples, part.texts, strict=True):
                if len(sample.ids) <= max_length:
                    fitted.append(sample)
                    continue
                trained = [answer.message for answer in text.answers]
                shortened = shorten(self.renderer, content.messages, content.tools, trained, max_length)
                if shortened is not None:
                    fitted.append(shortened)
                    self.report.shortened += 1
        elif too_long == "truncate":
            fitted = [Rendered(sample.ids[:max_length], sample.labels[:max_length]) for sample in samples]
            self.report.shortened += len(fitted)
        self.report.lost_labels += sum(map(_count, samples)) - sum(map(_count, fitted))
        return fitted


def _in_chunks(rows: Rows) -> Iterator[list[Row | BadRow]]:
    """Yield rows in chunks; a row with more than ``MAX_TEXT`` becomes a bad one."""
    chunk, chunk_text = list[Row | BadRow](), 0
    for row in rows:
        row_text = count_text(row.values) if isinstance(row, Row) else 0
        is_bad = row_text > MAX_TEXT
        chunk.append(BadRow(row.where, TOO_MUCH_TEXT, row.source) if is_bad else row)
        chunk_text += 0 if is_bad else row_text
        if len(chunk) == _CHUNK_ROWS or chunk_text > _CHUNK_TEXT:
            yield chunk
            chunk, chunk_text = [], 0
    if chunk:
        yield chunk


@contextmanager
def _noting_faults(number: int, row: Row, bad: dict[int, BadRow]) -> Iterator[None]:
    """Note a row as bad if it cannot be used."""
    try:
        yield
    except RowFault as fault:
        bad[number] = BadRow(row.where, str(fault))


def _prompt_of(sample: Rendered) -> list[int]:
    return sample.ids[: next(i for i, label in enumerate(sample.labels) if label != IGNORED)]


def _count(sample: Rendered) -> int:
    """Count labelled tokens."""
    return len(sample.labels) - sample.labels.count(IGNORED)
