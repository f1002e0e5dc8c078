"""From rows to samples or prompts, in chunks, with a report of what became of them."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from qlora_lightning.base.tensors import IGNORED
from qlora_lightning.data.chat.labels import ChatRenderer, Rendered
from qlora_lightning.data.chat.lengths import shorten, split_up
from qlora_lightning.data.chat.render import RenderedText
from qlora_lightning.data.data_report import DataReport
from qlora_lightning.data.rows.bad_rows import BadRow, RowFault
from qlora_lightning.data.rows.conversation import Chat, Content, Pair, Text
from qlora_lightning.data.rows.convert import RowConverter
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.data.samples import SampleSet, SampleSetBuilder, find_repeats, hold_out

TOO_LONG = "longer than max_length (too_long: drop)"
CHUNK = 512  # rows that are rendered together: the tokenizer encodes them on all cores
_PAUSE = 10.0  # seconds between two lines of the log

Rows = Iterable[Row | BadRow]
Sources = Sequence[tuple[RowSettings, Rows]]
"""How the rows of each source are read, and the rows."""
Prepared = tuple[SampleSet, DataReport]


class Prompt(NamedTuple):
    """One row to predict: the ids that generation starts from, the row's own answer if it has one, and the row."""

    ids: list[int]
    reference: str | None
    row_id: int
    values: dict[str, Any]


class _Converted(NamedTuple):
    """The content of a good row, or both of a pair, with its number in the split and that of its source."""

    number: int
    source: int
    row: Row
    parts: Sequence[Content]


def divide(samples: SampleSet, report: DataReport, fraction: float, seed: int) -> list[Prepared]:
    """Hold validation rows out of training rows; what became of rows before is reported with the training rows."""
    train, val = hold_out(samples, fraction, seed)
    left_out = sum(report.dropped.values()) + report.bad_rows
    divided = [
        (train, replace(report, rows=len(np.unique(train.row_ids)) + left_out)),
        (val, DataReport("val", len(np.unique(val.row_ids)), formats=report.formats, files=report.files)),
    ]
    for own, report in divided:
        report.count_samples(own)
        report.count_duplicates(own)
    return divided


@dataclass
class Preparation:
    """Turns the rows of a split into samples, or, if they are to be predicted, into prompts; and reports on them.

    A row's samples follow from it and the settings alone. With ``pairs`` a row is two answers to compare, and its
    sample both, one behind the other; or one with a verdict, if all rows are such.
    """

    renderer: ChatRenderer
    split: str
    max_length: int
    too_long: str
    pairs: bool
    missing: Sequence[str]  # answers that mean that there is none

    def __post_init__(self) -> None:
        self.for_prompts = self.split == "predict"  # its samples have no labels, its rows may lack answers
        self.report, self.builder, self.prompts = DataReport(self.split), SampleSetBuilder(), list[Prompt]()
        self._are_pairs: bool | None = None

    def prepare(self, sources: Sources, deduplicate: bool) -> Prepared:
        """Turn all rows into samples; a source is read when its turn comes."""
        report, logged = self.report, time.monotonic()
        pairs = self.pairs and not self.for_prompts
        converters = [RowConverter(settings, not self.for_prompts, pairs) for settings, _ in sources]
        for source, (converter, (_, rows)) in enumerate(zip(converters, sources, strict=True)):
            remaining = iter(rows)
            chunk = list(islice(remaining, CHUNK))
            converter.check([row for row in chunk if isinstance(row, Row)])
            while chunk:
                self._add(source, converter, chunk)
                if time.monotonic() - logged > _PAUSE:
                    rank_zero_info(f"{self.split}: {report.rows:,} rows prepared")
                    logged = time.monotonic()
                chunk = list(islice(remaining, CHUNK))
            report.formats += [name for name in converter.formats if name not in report.formats]
            report.unread_columns += [name for name in converter.unread_columns if name not in report.unread_columns]
            report.absent_columns += sorted(converter.absent_columns)
        samples = self.builder.build()
        if deduplicate and not self.for_prompts:
            repeated = find_repeats(samples).row_ids
            samples = samples.take(np.flatnonzero(~np.isin(samples.row_ids, repeated)))
            if len(repeated):
                report.drop("equal to an earlier row (deduplicate: true)", len(repeated))
        elif not self.for_prompts:
            report.count_duplicates(samples)
        report.count_samples(samples)
        return samples, report

    def _add(self, source: int, converter: RowConverter, rows: Sequence[Row | BadRow]) -> None:
        """Add rows of a source; bad ones are reported and left out."""
        renderer, bad = self.renderer, dict[int, BadRow]()
        written: list[tuple[_Converted, list[list[RenderedText]]]] = []
        for number, row in enumerate(rows, start=self.report.rows):
            if isinstance(row, BadRow):
                bad[number] = row
                continue
            with _noting_faults(number, row, bad):
                content = converter.convert(row)
                each = _Converted(number, source, row, content if isinstance(content, Pair) else [content])
                if self.for_prompts:
                    self._add_prompt(each)
                elif self._is_wanted(each):
                    written.append((each, [renderer.write(part) for part in each.parts]))
        encoded = iter(renderer.encode([text for _, parts in written for texts in parts for text in texts]))
        for each, parts in written:
            encodings = [[next(encoded) for _ in texts] for texts in parts]
            with _noting_faults(each.number, each.row, bad):
                self._add_samples(each, parts, list(map(renderer.label, each.parts, parts, encodings)))
        self.report.rows += len(rows)
        for number in sorted(bad):
            self.report.count_bad_row(bad[number])

    def _is_wanted(self, converted: _Converted) -> bool:
        """Whether a row is trained; one whose answer means none may be left out, or else is noted."""
        is_pair = isinstance(converted.parts, Pair)
        if self._are_pairs not in (None, is_pair):
            raise RowFault("two answers to compare and answers with a verdict do not mix: give each a run")
        self._are_pairs = is_pair
        messages = [each for part in converted.parts if isinstance(part, Chat) for each in part.messages]
        answers = {each["content"].strip() for each in messages if each["role"] == "assistant"}
        if not {each.lower() for each in answers}.isdisjoint(self.missing):
            self.report.drop("an answer is one of data.missing")
            return False
        questions = [each["content"] for each in messages if each["role"] == "user"]
        self.report.note_suspicious(converted.row.where, answers, questions)
        return True

    def _add_prompt(self, converted: _Converted) -> None:
        number, source, row, (content, *_) = converted
        if not isinstance(content, Chat):
            raise RowFault("holds no conversation, so there is nothing to answer")
        *asked, last = content.messages
        reference = last["content"] if last["role"] == "assistant" else None
        ids = self.renderer.render_prompt(content.messages if reference is None else asked, content.tools)
        self.builder.add(ids, [IGNORED] * len(ids), number, source, row.file, row.line)
        self.prompts.append(Prompt(ids, reference, number, row.values))

    def _add_samples(
        self, converted: _Converted, parts: list[list[RenderedText]], rendered: list[list[Rendered]]
    ) -> None:
        """Add the samples of a row, or count why it has none: ``rendered`` is of each part its samples."""
        (number, source, row, contents), report = converted, self.report
        fitted = [
            [sample for sample in self._fit(*part) if _count(sample)]
            for part in zip(contents, parts, rendered, strict=True)
        ]
        turn_by_turn = any(len(samples) > 1 for samples in rendered)
        whole = [sample for samples in rendered for sample in samples]
        if self.pairs and turn_by_turn:
            report.leave_untrained("the chat template makes several samples of an answer, which cannot be compared")
        elif not any(map(_count, whole)):
            report.leave_untrained("every answer is marked `train: false`")
        elif not all(fitted):
            if self.too_long == "drop" and any(len(sample.ids) > self.max_length for sample in whole):
                report.drop(TOO_LONG)
            else:
                report.leave_untrained("no labelled token within max_length")
        elif isinstance(contents, Pair):
            (chosen,), (rejected,) = fitted
            if chosen == rejected:
                report.drop("their two answers are the same within max_length")
            elif fitted != rendered and _prompt_of(chosen) != _prompt_of(rejected):
                report.drop("their prompt is too long for the two answers to share what is left of it")
            else:
                ids, labels = chosen.ids + rejected.ids, chosen.labels + rejected.labels
                self.builder.add(ids, labels, number, source, row.file, row.line, len(chosen.ids))
        else:
            desirable = contents[0].desirable if isinstance(contents[0], Chat) else None
            for ids, labels in fitted[0]:
                self.builder.add(ids, labels, number, source, row.file, row.line, desirable=desirable)

    def _fit(self, content: Content, texts: list[RenderedText], rendered: list[Rendered]) -> list[Rendered]:
        """Return the samples of a content, those that are too long as ``too_long`` has them."""
        most, too_long = self.max_length, self.too_long
        if all(len(sample.ids) <= most for sample in rendered):
            return rendered
        if isinstance(content, Text) or too_long == "split":
            context = 1 if isinstance(content, Text) else None  # every piece of a text is trained
            return [piece for sample in rendered for piece in split_up(sample, most, context)]
        fitted = list[Rendered]()
        if too_long == "truncate" and isinstance(content, Chat):
            for sample, text in zip(rendered, texts, strict=True):
                trained = [answer.message for answer in text.answers]
                is_long = len(sample.ids) > most
                short = shorten(self.renderer, content.messages, content.tools, trained, most) if is_long else sample
                fitted += [] if short is None else [short]
                self.report.shortened += is_long and short is not None
        elif too_long == "truncate":
            fitted = [Rendered(sample.ids[:most], sample.labels[:most]) for sample in rendered]
            self.report.shortened += len(fitted)
        self.report.lost_labels += sum(map(_count, rendered)) - sum(map(_count, fitted))
        return fitted


@contextmanager
def _noting_faults(number: int, row: Row, bad: dict[int, BadRow]) -> Iterator[None]:
    """Note a row that cannot be used as bad."""
    try:
        yield
    except RowFault as fault:
        bad[number] = BadRow(row.where, str(fault))


def _prompt_of(sample: Rendered) -> list[int]:
    return sample.ids[: next(at for at, label in enumerate(sample.labels) if label != IGNORED)]


def _count(sample: Rendered) -> int:
    """Count labelled tokens."""
    return len(sample.labels) - sample.labels.count(IGNORED)
